// Behind the calls of NVRTC (fake_nvrtc.h), compiles a kernel for the processor, by the C++ compiler: a "cubin"
// is a shared object, which fake_libcuda.cc with emulated_gpu.cc runs. Statements of inline PTX become calls. Undefined
// behaviour (an index outside an array, a shift too far, ..) ends the process with an illegal instruction.
// Environment: EMULATED_REPLACE and EMULATED_BY (a text in the kernel's headers, and another one in its place: what a
// test is to find wrong).
// SPDX-License-Identifier: Apache-2.0
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "tests/stand_ins/fake_nvrtc.h"

namespace {

namespace fs = std::filesystem;

std::string Read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}
void Write(const fs::path& path, const std::string& text) {
  fs::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary) << text;
}

// The end of what begins with the bracket at `begin`: one past its fellow. Brackets within strings do not count.
size_t EndOfBracket(const std::string& text, size_t begin) {
  int depth = 0;
  for (size_t i = begin; i < text.size(); ++i) {
    if (text[i] == '"') {
      while (text[++i] != '"') i += text[i] == '\\';
    } else if (text[i] == '(') {
      ++depth;
    } else if (text[i] == ')' && --depth == 0) {
      return i + 1;
    }
  }
  return text.size();
}

// asm [volatile](text : "=r"(a), .. : "l"(b), .. : "memory") to EmulatedPtx(text, (a), .., (b), ..).
std::string WithoutAsm(const std::string& text) {
  std::string out;
  size_t at = 0;
  for (;;) {
    size_t found = text.find("asm", at);
    while (found != std::string::npos && found > 0 && (std::isalnum(text[found - 1]) || text[found - 1] == '_'))
      found = text.find("asm", found + 3);
    if (found == std::string::npos) return out + text.substr(at);
    size_t open = found + 3;
    while (std::isspace(static_cast<unsigned char>(text[open]))) ++open;
    if (text.compare(open, 8, "volatile") == 0) open += 8;
    if (text[open] != '(') {
      out += text.substr(at, found + 3 - at);
      at = found + 3;
      continue;
    }
    out += text.substr(at, found - at) + "EmulatedPtx(";
    const size_t end = EndOfBracket(text, open);
    int part = 0;  // the text, outputs, inputs, clobbers
    for (size_t i = open + 1; i < end - 1;) {
      if (text[i] == ':') {
        ++part;
        ++i;
      } else if (part == 0 && text[i] == '"') {
        size_t close = i + 1;
        while (text[close] != '"') close += text[close] == '\\' ? 2 : 1;
        out += text.substr(i, close + 1 - i);
        i = close + 1;
      } else if (part == 0 && text[i] == '(') {  // of a macro
        const size_t close = EndOfBracket(text, i);
        out += text.substr(i, close - i);
        i = close;
      } else if (part == 0) {
        out += text[i++];
      } else if (text[i] == '(' && part < 3) {
        const size_t close = EndOfBracket(text, i);
        out += ", " + text.substr(i, close - i);
        i = close;
      } else {
        ++i;
      }
    }
    out += ")";
    at = end;
  }
}

std::string Replaced(std::string text) {
  const char* from = std::getenv("EMULATED_REPLACE");
  const char* by = std::getenv("EMULATED_BY");
  if (!from || !*from || !by) return text;
  for (size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += std::strlen(by))
    text.replace(at, std::strlen(from), by);
  return text;
}

}  // namespace

int Compile(FakeProgram* program, const std::vector<std::string>&) {
  std::string pattern = (fs::temp_directory_path() / "emulated-XXXXXX").string();
  if (!mkdtemp(pattern.data())) return 1;
  const fs::path folder = pattern;
  for (const auto& [name, text] : program->headers) Write(folder / name, WithoutAsm(Replaced(text)));
  const bool backward = program->source.find("rope_backward_kernel") != std::string::npos;
  Write(folder / "rope_kernel.cc", "#include \"tests/stand_ins/emulated_gpu/kernel.h\"\n" + program->source +
                                       "extern \"C\" __attribute__((visibility(\"default\"))) void "
                                       "emulated_kernel(const " +
                                       (backward ? "rope_backward_cuda_args* args) { rope_backward_kernel"
                                                 : "rope_cuda_args* args) { rope_kernel") +
                                       "(*args); }\n");
  // Variables that nobody has set hold a pattern, as a register does.
  const auto quoted = [](const fs::path& path) { return " '" + path.string() + "'"; };
  const std::string command =
      EMULATED_CXX
      " -std=c++17 -w -O1 -fPIC -shared -fvisibility=hidden -fno-exceptions -fno-rtti -fno-strict-aliasing"
      " -fsanitize=undefined -fno-sanitize=vptr -fsanitize-undefined-trap-on-error -ffp-contract=off"
      " -ftrivial-auto-var-init=pattern -I" +
      quoted(folder) + " -I '" EMULATED_SOURCE_DIR "'" + quoted(folder / "rope_kernel.cc") + " -o" +
      quoted(folder / "rope_kernel.so") + " 2>" + quoted(folder / "log");
  const int status = std::system(command.c_str());
  const bool compiled = WIFEXITED(status) && WEXITSTATUS(status) == 0;
  if (compiled) program->cubin = Read(folder / "rope_kernel.so");
  program->log = compiled ? "" : command + "\n" + Read(folder / "log").substr(0, 4000);
  std::error_code ignored;
  fs::remove_all(folder, ignored);
  return compiled ? 0 : 6;
}
