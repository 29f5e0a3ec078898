// ropewalk completion, ropewalk manual: what a shell completes, and a page for man, from the options as they are.
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <memory>
#include <string>
#include <vector>

#include "cli/common.h"

namespace ropewalk::cli {
namespace {

std::vector<const CLI::App*> Subcommands(const CLI::App& app) {
  return app.get_subcommands([](const CLI::App*) { return true; });
}

// "--models", "--tokens", ..
std::vector<std::string> Names(const CLI::Option& option) {
  std::vector<std::string> names;
  for (const std::string& name : option.get_lnames()) names.push_back("--" + name);
  for (const std::string& name : option.get_snames()) names.push_back("-" + name);
  return names;
}

// "neox interleaved" of the type "PAIRING:{neox,interleaved}"; "" if anything may follow.
std::string Choices(const CLI::Option& option) {
  const std::string type = option.get_type_name();
  const size_t begin = type.find('{'), end = type.find('}');
  if (begin == std::string::npos || end == std::string::npos) return "";
  std::string words = type.substr(begin + 1, end - begin - 1);
  for (char& c : words) {
    if (c == ',') c = ' ';
  }
  return words;
}

std::string Completion(const CLI::App& app, const std::string& shell) {
  std::string all, cases;
  for (const CLI::App* command : Subcommands(app)) {
    all += command->get_name() + " ";
    std::string names, values;
    for (const CLI::Option* option : command->get_options()) {
      std::string pattern;
      for (const std::string& name : Names(*option)) {
        names += name + " ";
        pattern += (pattern.empty() ? "" : "|") + name;
      }
      const std::string choices = Choices(*option);
      if (pattern.empty()) {
        names += choices + " ";  // what has no name comes by its place
      } else if (!choices.empty()) {
        values += fmt::format("        {}) words='{}' ;;\n", pattern, choices);
      }
    }
    cases += fmt::format("      {})\n        words='{}'\n", command->get_name(), names);
    if (!values.empty()) cases += fmt::format("        case $before in\n{}        esac\n", values);
    cases += "        ;;\n";
  }
  const std::string zsh =
      shell == "zsh" ? "#compdef ropewalk\nautoload -U +X bashcompinit && bashcompinit\n" : std::string();
  return zsh + fmt::format(
                   // Bash parts words at colons, which some values have, and completes what is behind the last one.
                   "_ropewalk() {{\n"
                   "  local line=${{COMP_LINE:0:COMP_POINT}} words= typed at current before\n"
                   "  typed=($line)\n"
                   "  current=${{line##*[[:space:]]}}\n"
                   "  at=${{#typed[@]}}\n"
                   "  [ -n \"$current\" ] && at=$((at - 1))\n"
                   "  before=${{typed[at-1]}}\n"
                   "  if ((at == 1)); then\n"
                   "    words='{}--help --version'\n"
                   "  else\n"
                   "    case ${{typed[1]}} in\n{}"
                   "    esac\n"
                   "  fi\n"
                   "  COMPREPLY=($(compgen -W \"$words\" -- \"$current\"))\n"
                   "  case $COMP_WORDBREAKS in\n"
                   "    *:*) COMPREPLY=(\"${{COMPREPLY[@]#\"${{current%\"${{current##*:}}\"}}\"}}\") ;;\n"
                   "  esac\n"
                   "}}\n"
                   "complete -o default -F _ropewalk ropewalk\n",
                   all, cases);
}

// Text for man: no line is taken for a request, and a dash stays one.
std::string Roff(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (out.empty() || out.back() == '\n') {
      if (c == '.' || c == '\'') out += "\\&";
    }
    if (c == '\\') {
      out += "\\e";
    } else if (c == '-') {
      out += "\\-";
    } else {
      out += c;
    }
  }
  return out;
}

std::string Manual(const CLI::App& app) {
  std::string out = fmt::format(
      ".TH ROPEWALK 1 \"\" \"Ropewalk {0}\"\n"
      ".SH NAME\nropewalk \\- rotary position embedding: what serves, whether it is right, how fast it is\n"
      ".SH SYNOPSIS\n.B ropewalk\n.I SUBCOMMAND\n.RI [ OPTIONS ]\n"
      ".SH DESCRIPTION\n{1}\n.PP\n.nf\n{2}\n.fi\n.SH SUBCOMMANDS\n",
      ropewalk_version(), Roff(app.get_description()), Roff(app.get_footer()));
  for (const CLI::App* command : Subcommands(app)) {
    out += fmt::format(".SS {}\n{}\n", command->get_name(), Roff(command->get_description()));
    for (const CLI::Option* option : command->get_options()) {
      std::string names;
      for (const std::string& name : Names(*option)) names += (names.empty() ? "" : ", ") + Roff(name);
      if (names.empty()) names = Roff(option->get_name());
      const std::string type = option->get_items_expected_max() > 0 ? Roff(option->get_type_name()) : "";
      out += fmt::format(".TP\n\\fB{}\\fR{}\n{}\n", names, type.empty() ? "" : " \\fI" + type + "\\fR",
                         Roff(option->get_description()));
    }
    if (!command->get_footer().empty()) out += fmt::format(".PP\n.nf\n{}\n.fi\n", Roff(command->get_footer()));
  }
  return out;
}

}  // namespace

void AddManual(CLI::App* app, int* exit_code) {
  auto shell = std::make_shared<std::string>();
  CLI::App* completion = app->add_subcommand("completion", "what bash or zsh completes: a script for it to read");
  completion->add_option("SHELL", *shell, "bash or zsh")
      ->required()
      ->check(CLI::IsMember({"bash", "zsh"}))
      ->type_name("");
  completion->footer(
      "Examples:\n"
      "  source <(ropewalk completion bash)               in ~/.bashrc\n"
      "  ropewalk completion zsh >~/.zfunc/_ropewalk      a folder of fpath");
  completion->callback([app, shell, exit_code] {
    fmt::print("{}", Completion(*app, *shell));
    *exit_code = kHeld;
  });
  CLI::App* manual = app->add_subcommand("manual", "this command's page for man");
  manual->footer(
      "Examples:\n"
      "  ropewalk manual | man -l -\n"
      "  ropewalk manual >~/.local/share/man/man1/ropewalk.1");
  manual->callback([app, exit_code] {
    fmt::print("{}", Manual(*app));
    *exit_code = kHeld;
  });
}

}  // namespace ropewalk::cli
