// What Intel's compiler makes of the SPIR-V kernel: SIMD width, registers, spills, instructions, loads and stores by
// the bytes of a lane, for each variant and device, without the device: spirv-opt sets the specialisation constants,
// ocloc compiles, iga64 disassembles. Ends with 1 if a variant spills, is narrower than 16 lanes, wants more than 128
// registers or does not compile. intel_report [--all] [--device pvc,dg2] [--csv FILE] [MODEL.json ..]: without --all,
// as few variants as hold every pair of choices; models add their own shapes.
// SPDX-License-Identifier: Apache-2.0
#include <elf.h>
#include <stdlib.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <regex>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "core/text.h"
#include "scripts/report.h"
#include "tests/spirv_variants.h"

namespace ropewalk {
namespace {

namespace fs = std::filesystem;

struct Target {
  const char* name;      // ocloc's
  const char* platform;  // iga64's
  int register_bytes;
};
constexpr Target kTargets[] = {{"pvc", "xehpc", 64}, {"dg2", "xehpg", 32}};

// Messages to memory by the bytes that each lane moves; 0: one block or one value for all lanes.
using Widths = std::map<int, int>;

struct Row {
  int simd = 0, registers = 0, spilled_bytes = 0, instructions = 0, atomics = 0;
  Widths loads, stores;
  std::string error;
};

std::string ReadAll(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// The section of an ELF file whose name begins so; "" if there is none.
std::string Section(const std::string& elf, std::string_view name) {
  if (elf.size() < sizeof(Elf64_Ehdr)) return "";
  Elf64_Ehdr header;
  std::memcpy(&header, elf.data(), sizeof(header));
  const auto section = [&](size_t i) {
    Elf64_Shdr out{};
    const size_t at = header.e_shoff + i * sizeof(out);
    if (at + sizeof(out) <= elf.size()) std::memcpy(&out, elf.data() + at, sizeof(out));
    return out;
  };
  const Elf64_Shdr names = section(header.e_shstrndx);
  for (size_t i = 0; i < header.e_shnum; ++i) {
    const Elf64_Shdr s = section(i);
    const size_t at = names.sh_offset + s.sh_name;
    if (at < elf.size() && std::string_view(elf.c_str() + at).starts_with(name) &&
        s.sh_offset + s.sh_size <= elf.size()) {
      return elf.substr(s.sh_offset, s.sh_size);
    }
  }
  return "";
}

// The number after "key:" in a line of ze_info that comes at or after `from`; -1 if there is none.
int Field(const std::string& info, const std::string& key, size_t from = 0) {
  const size_t at = info.find(key + ":", from);
  return at == std::string::npos ? -1 : std::atoi(info.c_str() + at + key.size() + 1);
}

// Counts what a disassembled line does.
void ReadLine(const std::string& line, const Target& target, Row* row) {
  static const std::regex instruction(R"(^(?:\(.*?\))?\s*[a-z].*\((\d+)\|M\d+\))");
  static const std::regex scattered(R"((load|store)\.[a-z]+\.d(\d+)(?:u\d+)?(?:x(\d+))?(t?)\.)");
  static const std::regex lengths(R"(wr:(\d+)h?\+(\d+), rd:(\d+);)");
  std::smatch found;
  if (!std::regex_search(line, found, instruction)) return;
  ++row->instructions;
  const int lanes = std::stoi(found[1]);
  const size_t comment = line.find("//");
  if (line.find("send") == std::string::npos || comment == std::string::npos) return;
  const std::string text = line.substr(comment);
  if (text.find("atomic") != std::string::npos) {
    ++row->atomics;
  } else if (std::smatch m; std::regex_search(text, m, scattered)) {  // messages of the newer cache
    const int bytes = std::stoi(m[2]) / 8 * (m[3].matched ? std::stoi(m[3]) : 1);
    ++(m[1] == "load" ? row->loads : row->stores)[m[4].length() || lanes == 1 ? 0 : bytes];
  } else if (std::regex_search(text, m, lengths)) {  // of the older data port
    const bool load = text.find("read") != std::string::npos, store = text.find("write") != std::string::npos;
    const bool block = text.find("block") != std::string::npos || lanes == 1;
    const int registers = std::stoi(load ? m[3] : m[2]);
    if (load || store) ++(load ? row->loads : row->stores)[block ? 0 : registers * target.register_bytes / lanes];
  }
}

Row Compile(const SpirvVariant& variant, const Target& target, const fs::path& directory) {
  Row row;
  const SpirvModule* module = RopeSpirvModuleOf(variant.key);
  if (!module) return row.error = "there is no such module", row;
  const fs::path raw = directory / "raw.spv", spv = directory / "k.spv", log = directory / "log";
  for (const char* name : {"out", "k.text", "k.asm"}) fs::remove_all(directory / name);
  std::ofstream(raw, std::ios::binary)
      .write(reinterpret_cast<const char*>(module->bytes), static_cast<std::streamsize>(module->size));
  std::string constants;
  for (const SpirvConstant& constant : RopeSpirvConstants(variant.key)) {
    Append(&constants, Text(constants.empty() ? "" : " ", constant.id, ":", constant.value));
  }
  const auto run = [&](const std::string& command) {
    if (std::system(Text(command, " > ", log.string(), " 2>&1").c_str()) == 0) return true;
    row.error = Text(command, ": ", ReadAll(log));
    return false;
  };
  if (!run(Text("spirv-opt --set-spec-const-default-value '", constants, "' --freeze-spec-const ", raw.string(), " -o ",
                spv.string())) ||
      !run(Text("ocloc compile -spirv_input -file ", spv.string(), " -device ", target.name,
                " --format zebin -options '", kRopeLevelZeroOptions, "' -out_dir ", (directory / "out").string(),
                " -output k"))) {
    return row;
  }
  std::string binary;
  for (const auto& entry : fs::directory_iterator(directory / "out")) {
    if (entry.path().extension() == ".bin") binary = ReadAll(entry.path());
  }
  const std::string info = Section(binary, ".ze_info"), code = Section(binary, ".text.");
  row.simd = Field(info, "simd_size");
  row.registers = Field(info, "grf_count");
  for (size_t at = 0; (at = info.find("type:            scratch", at)) != std::string::npos; ++at) {
    row.spilled_bytes += std::max(0, Field(info, "size", at));
  }
  std::ofstream(directory / "k.text", std::ios::binary).write(code.data(), static_cast<std::streamsize>(code.size()));
  if (!run(Text("iga64 -d -p=", target.platform, " ", (directory / "k.text").string(), " -o ",
                (directory / "k.asm").string()))) {
    return row;
  }
  std::istringstream lines(ReadAll(directory / "k.asm"));
  for (std::string line; std::getline(lines, line);) ReadLine(line, target, &row);
  if (row.instructions == 0 || row.simd <= 0) row.error = "the result has no kernel";
  return row;
}

std::vector<Row> CompileAll(const std::vector<SpirvVariant>& variants, const Target& target) {
  std::vector<Row> rows(variants.size());
  OnAllThreads(rows.size(), [&](const auto& next) {
    std::string name = (fs::temp_directory_path() / "ropewalk-intel-XXXXXX").string();
    if (!mkdtemp(name.data())) return;
    for (size_t i = next(); i < rows.size(); i = next()) {
      rows[i] = Compile(variants[i], target, name);
      if (i % 20 == 0) std::fprintf(stderr, "\r%s: %zu of %zu ", target.name, i, rows.size());
    }
    fs::remove_all(name);
  });
  std::fprintf(stderr, "\r");
  return rows;
}

std::string WidthsText(const Widths& widths) {
  std::string text;
  for (auto it = widths.rbegin(); it != widths.rend(); ++it) {
    Append(&text, Text(text.empty() ? "" : " ", it->second, "x", it->first ? Text(it->first) : std::string("block")));
  }
  return text.empty() ? "none" : text;
}

bool IsBad(const Row& row) {
  return !row.error.empty() || row.spilled_bytes || row.simd < ROPE_SUB_GROUP || row.registers > 128;
}

// Prints a line for the device, and one for each bad variant; returns how many are bad.
int Report(const Target& target, const std::vector<SpirvVariant>& variants, const std::vector<Row>& rows) {
  std::vector<int> instructions, simd, registers;
  int bad = 0, spills = 0;
  for (const Row& row : rows) {
    bad += IsBad(row);
    if (!row.error.empty()) continue;
    instructions.push_back(row.instructions);
    simd.push_back(row.simd);
    registers.push_back(row.registers);
    spills += row.spilled_bytes > 0;
  }
  std::ranges::sort(instructions);
  if (!instructions.empty()) {
    std::printf(
        "%s: %zu variants, SIMD%d or wider, at most %d registers, %d spill; %d to %d instructions, median %d; %d bad\n",
        target.name, rows.size(), *std::ranges::min_element(simd), *std::ranges::max_element(registers), spills,
        instructions.front(), instructions.back(), instructions[instructions.size() / 2], bad);
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    if (!IsBad(rows[i])) continue;
    std::printf("  BAD %s (case %s): %s\n", RopeSpirvName(variants[i].key).c_str(), variants[i].of.c_str(),
                rows[i].error.empty() ? Text("SIMD", rows[i].simd, ", ", rows[i].registers, " registers, ",
                                             rows[i].spilled_bytes, " bytes spilled")
                                            .c_str()
                                      : rows[i].error.c_str());
  }
  return bad;
}

int Main(const ReportOptions& options) {
  const auto fail = [](const std::string& text) {
    std::fprintf(stderr, "error: %s\n", text.c_str());
    return 2;
  };
  if (*RopeSpirvMissing()) return fail(RopeSpirvMissing());
  for (const char* tool : {"spirv-opt --version", "ocloc --help", "iga64 -h"}) {
    const int code = std::system(Text(tool, " > /dev/null 2>&1").c_str());
    if (WIFEXITED(code) && WEXITSTATUS(code) == 127) {
      return fail(Text(tool, " cannot run; apt-get install spirv-tools intel-opencl-icd libigc-tools"));
    }
  }
  std::vector<RopeCase> cases;
  if (const Status status = AddModelCases(options.models, &cases); !status.ok()) return fail(status.text());
  const std::vector<RopeCase> all = RopeCases();
  cases.insert(cases.end(), all.begin(), all.end());
  std::ofstream csv(options.csv.empty() ? "/dev/null" : options.csv);
  csv << "device,kernel,case,simd,registers,spilled_bytes,instructions,loads,stores,atomics\n";
  int bad = 0;
  for (const Target& target : kTargets) {
    if (!options.targets.empty() && std::ranges::find(options.targets, target.name) == options.targets.end()) continue;
    const SpirvDevice device = {.threads = 512, .max_local = 1024, .register_bytes = target.register_bytes};
    std::vector<SpirvVariant> variants;
    if (const Status status = SpirvVariantsOf(cases, device, &variants); !status.ok()) return fail(status.text());
    const size_t known = variants.size();
    if (!options.all) variants = CoveringSpirvVariants(variants);
    std::printf("%s: %zu cases need %zu variants; %zu of them compiled\n", target.name, cases.size(), known,
                variants.size());
    const std::vector<Row> rows = CompileAll(variants, target);
    bad += Report(target, variants, rows);
    for (size_t i = 0; i < rows.size(); ++i) {
      const Row& row = rows[i];
      csv << target.name << ',' << RopeSpirvName(variants[i].key) << ',' << variants[i].of << ',' << row.simd << ','
          << row.registers << ',' << row.spilled_bytes << ',' << row.instructions << ',' << WidthsText(row.loads) << ','
          << WidthsText(row.stores) << ',' << row.atomics << '\n';
    }
  }
  return bad ? 1 : 0;
}

}  // namespace
}  // namespace ropewalk

int main(int count, char** arguments) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // lines as they come, into a file as well
  ropewalk::ReportOptions options;
  const char* usage = "intel_report [--all] [--device pvc,dg2] [--csv FILE] [MODEL.json ..]";
  return ropewalk::ParseOptions(count, arguments, "--device", usage, &options) ? ropewalk::Main(options) : 2;
}
