// What the reports on compilers share: their options, and the cases of models.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdio>
#include <sstream>
#include <string>
#include <vector>

#include "conformance/cases.h"
#include "conformance/models.h"
#include "models/model_config.h"

namespace ropewalk {

struct ReportOptions {
  bool all = false;
  std::vector<std::string> targets;  // architectures or devices; none: every one
  std::string csv;
  std::vector<std::string> models;
};

// False, after it has said how the program is called, if an option is not known. `target`: "--arch" or the like.
inline bool ParseOptions(int count, char** arguments, const std::string& target, const char* usage,
                         ReportOptions* options) {
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--all") {
      options->all = true;
    } else if (argument == "--csv" && i + 1 < count) {
      options->csv = arguments[++i];
    } else if (argument == target && i + 1 < count) {
      std::istringstream list(arguments[++i]);
      for (std::string name; std::getline(list, name, ',');) options->targets.push_back(name);
    } else if (argument.starts_with("-")) {
      return std::fprintf(stderr, "usage: %s\n", usage), false;
    } else {
      options->models.push_back(argument);
    }
  }
  return true;
}

inline Status AddModelCases(const std::vector<std::string>& models, std::vector<RopeCase>* cases) {
  std::vector<ConfigText> configs;
  for (const std::string& path : models) ROPEWALK_TRY(ReadConfigs(path, &configs));
  for (const ConfigText& config : configs) {
    ModelConfig model;
    ROPEWALK_TRY(ReadModelConfig(config.json, config.place, &model));
    for (RopeCase& c : CasesOfModel(model, config.json, 16, kBF16)) cases->push_back(std::move(c));
  }
  return {};
}

}  // namespace ropewalk
