// What Intel's compiler makes of the SPIR-V kernel: SIMD width, registers, spills, instructions, loads and stores by
// the bytes of a lane, for each variant and device, without the device: spirv-opt sets the specialisation constants,
// ocloc compiles, iga64 disassembles. Ends with 1 if a variant spills, is narrower than 16 lanes, wants more than 128
// registers, does not move aligned rows as vectors or does not compile.
//
// intel_report [--all] [--device pvc,dg2] [--csv FILE] [--known FILE] [--every N] [MODEL.json ..]: without --all, as
// few variants as hold every pair of choices; --every: each Nth of those; models add their own shapes. --known takes
// what the table of an earlier run says of the same kernel. intel_report --verify PAGE [MODEL.json ..] compiles
// nothing: ends with 1 unless the page is of this very kernel and of all its variants, none of them bad. --backward: of
// the kernels of the gradient instead, of all cases that have one.
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
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "backends/spirv/plan.h"
#include "base/files.h"
#include "base/text.h"
#include "conformance/cases.h"
#include "conformance/variants.h"
#include "scripts/report.h"

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

struct Options : ReportOptions {
  size_t every = 1;
  std::string known, verify;
  bool backward = false;
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

void CompileAll(const std::vector<SpirvVariant>& variants, const std::vector<size_t>& wanted, const Target& target,
                std::vector<Row>* rows) {
  OnAllThreads(wanted.size(), [&](const auto& next) {
    std::string name = (fs::temp_directory_path() / "ropewalk-intel-XXXXXX").string();
    if (!mkdtemp(name.data())) return;
    for (size_t i = next(); i < wanted.size(); i = next()) {
      (*rows)[wanted[i]] = Compile(variants[wanted[i]], target, name);
      if (i % 20 == 0) std::fprintf(stderr, "\r%s: %zu of %zu ", target.name, i, wanted.size());
    }
    fs::remove_all(name);
  });
  std::fprintf(stderr, "\r");
}

// ---------------------------------------------------------------------------------------------------------------------
// The table

// Of what Intel's compiler is given.
std::string KernelDigest(bool backward) {
  std::string modules;
  for (const SpirvModule& module : RopeSpirvModules()) {
    if (backward == (module.entry == kSpirvRope)) continue;
    modules.append(reinterpret_cast<const char*>(module.bytes), module.size);
  }
  return Hex(DigestOf(modules));
}

// How many variants there are, and which: whatever the order of the cases that need them.
std::string VariantsText(const Target& target, const std::vector<SpirvVariant>& variants) {
  std::set<std::string> names;
  for (const SpirvVariant& variant : variants) names.insert(RopeSpirvName(variant.key));
  std::string all;
  for (const std::string& name : names) Append(&all, Text(name, "\n"));
  return Text(target.name, ": ", names.size(), " variants have the digest ", Hex(DigestOf(all)));
}

std::string WidthsText(const Widths& widths) {
  std::string text;
  for (auto it = widths.rbegin(); it != widths.rend(); ++it) {
    Append(&text, Text(text.empty() ? "" : " ", it->second, "x", it->first ? Text(it->first) : std::string("block")));
  }
  return text.empty() ? "none" : text;
}

Widths ParseWidths(const std::string& text) {
  Widths widths;
  std::istringstream parts(text);
  int count = 0;
  char cross = 0;
  for (std::string width; parts >> count >> cross >> width;) widths[width == "block" ? 0 : std::stoi(width)] = count;
  return widths;
}

constexpr const char* kHead = "device,kernel,case,simd,registers,spilled_bytes,instructions,loads,stores,atomics";

void WriteRow(const Target& target, const SpirvVariant& variant, const Row& row, std::ostream& csv) {
  csv << target.name << ',' << RopeSpirvName(variant.key) << ',' << variant.of << ',' << row.simd << ','
      << row.registers << ',' << row.spilled_bytes << ',' << row.instructions << ',' << WidthsText(row.loads) << ','
      << WidthsText(row.stores) << ',' << row.atomics << '\n';
}

// The rows by device and kernel, "pvc,bfloat16 neox ..", of a table of this kernel.
Status ReadTable(const std::string& path, bool backward, std::map<std::string, Row>* rows) {
  std::ifstream file(path);
  std::string line;
  if (!std::getline(file, line)) return Status::Invalid(Text(path, " cannot be read"));
  const std::string mine = Text("# kernel ", KernelDigest(backward));
  if (line != mine)
    return Status::Invalid(Text(path, " is of another kernel: it has \"", line, "\", not \"", mine, "\""));
  if (!std::getline(file, line) || line != kHead) return Status::Invalid(Text(path, " has other columns"));
  while (std::getline(file, line)) {
    std::vector<std::string> cells;
    std::istringstream parts(line);
    for (std::string cell; std::getline(parts, cell, ',');) cells.push_back(cell);
    if (cells.size() != 10) return Status::Invalid(Text(path, " has a broken line: ", line));
    Row row;
    const std::pair<int*, const std::string*> numbers[] = {{&row.simd, &cells[3]},
                                                           {&row.registers, &cells[4]},
                                                           {&row.spilled_bytes, &cells[5]},
                                                           {&row.instructions, &cells[6]},
                                                           {&row.atomics, &cells[9]}};
    for (const auto& [number, cell] : numbers) *number = std::atoi(cell->c_str());
    row.loads = ParseWidths(cells[7]);
    row.stores = ParseWidths(cells[8]);
    (*rows)[Text(cells[0], ",", cells[1])] = row;
  }
  return {};
}

// ---------------------------------------------------------------------------------------------------------------------
// What is asked of each

int DtypeBytes(uint8_t dtype) { return dtype == kRopeF32 ? 4 : dtype == kRopeE4M3 || dtype == kRopeE5M2 ? 1 : 2; }

// Whether the rows of an aligned variant are moved by whole vectors: there must be enough messages of that width, and
// none that are narrower but those of other things. "" if so, else what is wrong.
std::string RowsText(const RopeSpirvKey& key, const Target& target, const Row& row) {
  if (key.vector == 1) return "";
  const auto& c = key.constants;
  const int vector = key.vector, width = vector * DtypeBytes(key.dtype);
  // At least one pair of vectors for each unit; messages may be joined to wider ones.
  const int least = 2 * std::max<int>(c[kRopeSpecUnits], 1);
  const auto vectors = [&](const Widths& widths) {
    int count = 0;
    for (const auto& [bytes, messages] : widths) count += bytes / width * messages;
    return count;
  };
  if (vectors(row.loads) < least) return Text("only ", vectors(row.loads), " loads of ", width, " bytes");
  if (vectors(row.stores) < least) return Text("only ", vectors(row.stores), " stores of ", width, " bytes");

  std::set<int> loads, stores = {4};  // the record of faults
  const auto may = [&](std::set<int>* widths, int bytes) {
    widths->insert(bytes);
    if (target.register_bytes == 32 && bytes < 4) widths->insert(4);  // which has no narrower message
  };
  if (c[kRopeSpecTableDtype]) {
    const int bytes = DtypeBytes(c[kRopeSpecTableDtype]);
    const int run = std::min(c[kRopeSpecInterleaved] ? vector / 2 : vector, 16 / bytes);
    may(&loads, c[kRopeSpecTableVector] ? run * bytes : bytes);
    may(&loads, bytes);
  }
  if (c[kRopeSpecWeightDtype]) may(&loads, vector * DtypeBytes(c[kRopeSpecWeightDtype]));
  if (key.entry == kSpirvBackward && c[kRopeSpecSums]) {
    // Sums lie wherever a float may.
    loads.insert({4, 8, 12, 16});
    stores.insert({4, 8, 12, 16});
  }
  if (c[kRopeSpecAxes]) loads.insert({4, 8});  // the axes and positions of each pair
  if (key.entry == kSpirvRope && c[kRopeSpecCacheDtype]) {
    const int bytes = DtypeBytes(c[kRopeSpecCacheDtype]);
    may(&stores, vector * bytes);
    if (bytes == 1) loads.insert(4);  // the scale
  }
  const auto narrow = [&](const char* what, const Widths& widths, const std::set<int>& known) -> std::string {
    for (const auto& [bytes, messages] : widths) {
      if (bytes == 0 || bytes >= width || known.contains(bytes)) continue;
      return Text(messages, " ", what, " of ", bytes, " bytes, though rows are moved by ", width);
    }
    return "";
  };
  const std::string text = narrow("loads", row.loads, loads);
  return text.empty() ? narrow("stores", row.stores, stores) : text;
}

// "" if all is as it should be.
std::string BadText(const SpirvVariant& variant, const Target& target, const Row& row) {
  if (!row.error.empty()) return row.error;
  if (row.spilled_bytes || row.simd < ROPE_SUB_GROUP || row.registers > 128) {
    return Text("SIMD", row.simd, ", ", row.registers, " registers, ", row.spilled_bytes, " bytes spilled");
  }
  return RowsText(variant.key, target, row);
}

// Prints a line for the device, and one for each bad variant; returns how many are bad.
int Report(const Target& target, const std::vector<SpirvVariant>& variants, const std::vector<Row>& rows) {
  std::vector<int> instructions, simd, registers;
  int bad = 0, spills = 0;
  for (const Row& row : rows) {
    bad += !BadText(variants[static_cast<size_t>(&row - rows.data())], target, row).empty();
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
  int shown = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const std::string text = BadText(variants[i], target, rows[i]);
    if (text.empty() || ++shown > 40) continue;
    std::printf("  BAD %s (case %s): %s\n", RopeSpirvName(variants[i].key).c_str(), variants[i].of.c_str(),
                text.c_str());
  }
  if (shown > 40) std::printf("  and %d more\n", shown - 40);
  return bad;
}

int Main(const Options& options) {
  const auto fail = [](const std::string& text) {
    std::fprintf(stderr, "error: %s\n", text.c_str());
    return 2;
  };
  if (*RopeSpirvMissing() && !options.verify.empty()) {
    std::printf("nothing to compare %s with: %s\n", options.verify.c_str(), RopeSpirvMissing());
    return 0;
  }
  if (*RopeSpirvMissing()) return fail(RopeSpirvMissing());
  for (const char* tool : {"spirv-opt --version", "ocloc --help", "iga64 -h"}) {
    if (!options.verify.empty()) break;
    const int code = std::system(Text(tool, " > /dev/null 2>&1").c_str());
    if (WIFEXITED(code) && WEXITSTATUS(code) == 127) {
      return fail(Text(tool, " cannot run; apt-get install spirv-tools intel-opencl-icd libigc-tools"));
    }
  }
  const std::string kernel = KernelDigest(options.backward);
  std::vector<RopeCase> cases;
  if (const Status status = AddModelCases(options.models, &cases); !status.ok()) return fail(status.text());
  if (options.backward) {
    std::erase_if(cases, [](const RopeCase& c) { return c.cache != Cache::kNone; });
  }
  const std::vector<RopeCase> all = options.backward ? BackwardCases(1) : RopeCases();
  cases.insert(cases.end(), all.begin(), all.end());
  std::map<std::string, Row> known;
  if (!options.known.empty()) {
    if (const Status status = ReadTable(options.known, options.backward, &known); !status.ok())
      return fail(status.text());
  }
  const std::string page = options.verify.empty() ? "" : ReadAll(options.verify);
  if (!options.verify.empty() && page.find(Text("digest `", kernel, "`")) == std::string::npos) {
    return fail(Text(options.verify, " is of another kernel than that of the digest ", kernel));
  }
  std::ofstream csv(options.csv.empty() ? "/dev/null" : options.csv);
  csv << "# kernel " << kernel << '\n' << kHead << '\n';
  int bad = 0;
  for (const Target& target : kTargets) {
    if (!options.targets.empty() && std::ranges::find(options.targets, target.name) == options.targets.end()) continue;
    const SpirvDevice device = {.threads = 512, .max_local = 1024, .register_bytes = target.register_bytes};
    std::vector<SpirvVariant> variants;
    const Status found = options.backward ? SpirvBackwardVariantsOf(cases, device, &variants)
                                          : SpirvVariantsOf(cases, device, &variants);
    if (!found.ok()) return fail(found.text());
    const size_t all_variants = variants.size();
    const std::string digest = VariantsText(target, variants);
    if (!options.verify.empty()) {
      for (const std::string& line : {digest, Text(target.name, ": ", all_variants, " variants held, 0 bad")}) {
        if (page.find(line) == std::string::npos) return fail(Text(options.verify, " lacks \"", line, "\""));
      }
      std::printf("%s\n", digest.c_str());
      continue;
    }
    if (!options.all) variants = CoveringSpirvVariants(variants);
    if (options.every > 1) {
      for (size_t i = 0; i * options.every < variants.size(); ++i) variants[i] = variants[i * options.every];
      variants.resize((variants.size() + options.every - 1) / options.every);
    }
    const auto of_table = [&](const SpirvVariant& variant) {
      const auto it = known.find(Text(target.name, ",", RopeSpirvName(variant.key)));
      return it == known.end() ? nullptr : &it->second;
    };
    std::vector<Row> rows(variants.size());
    std::vector<size_t> wanted;
    for (size_t i = 0; i < variants.size(); ++i) {
      const Row* row = of_table(variants[i]);
      if (row) rows[i] = *row;
      if (!row) wanted.push_back(i);
    }
    std::printf("%s: %zu cases need %zu variants; %zu of them compiled\n%s\n", target.name, cases.size(), all_variants,
                variants.size(), digest.c_str());
    CompileAll(variants, wanted, target, &rows);
    const int of_target = Report(target, variants, rows);
    bad += of_target;
    if (of_target == 0) std::printf("%s: %zu variants held, 0 bad\n", target.name, variants.size());
    for (size_t i = 0; i < rows.size(); ++i) WriteRow(target, variants[i], rows[i], csv);
  }
  return bad ? 1 : 0;
}

}  // namespace
}  // namespace ropewalk

int main(int count, char** arguments) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // lines as they come, into a file as well
  ropewalk::Options options;
  std::vector<char*> shared = {arguments[0]};
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--backward") {
      options.backward = true;
    } else if (argument == "--known" && i + 1 < count) {
      options.known = arguments[++i];
    } else if (argument == "--verify" && i + 1 < count) {
      options.verify = arguments[++i];
    } else if (argument == "--every" && i + 1 < count) {
      options.every = static_cast<size_t>(std::max(1, std::atoi(arguments[++i])));
    } else {
      shared.push_back(arguments[i]);
    }
  }
  const char* usage =
      "intel_report [--backward] [--all] [--every N] [--device pvc,dg2] [--csv FILE] [--known FILE] [MODEL.json ..]\n"
      "       intel_report --verify PAGE [MODEL.json ..]";
  return ropewalk::ParseOptions(static_cast<int>(shared.size()), shared.data(), "--device", usage, &options)
             ? ropewalk::Main(options)
             : 2;
}
