// The command line as a program: what it prints is printed or it says so, and numbers are taken as they are or refused.
// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <gtest/gtest.h>
#include <pty.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/text.h"
#include "tests/fresh_process.h"

namespace ropewalk {
namespace {

struct Ended {
  int code = -1;
  std::string said;  // on stdout and stderr
};

Ended Shell(const std::string& line) {
  Ended ended;
  FILE* pipe = popen(line.c_str(), "r");
  char buffer[4096];
  while (pipe && fgets(buffer, sizeof(buffer), pipe)) ended.said += buffer;
  const int status = pipe ? pclose(pipe) : -1;
  if (WIFEXITED(status)) ended.code = WEXITSTATUS(status);
  return ended;
}

// By a shell, so that `arguments` may redirect.
Ended Command(const std::string& arguments) {
  return Shell(
      Text("(ROPEWALK_MODELS='", ROPEWALK_MODELS_DIR, "' exec '", ROPEWALK_COMMAND, "' ", arguments, ") 2>&1"));
}

class Cli : public testing::Test {
 protected:
  void SetUp() override {
    if (std::string(ROPEWALK_COMMAND).empty()) GTEST_SKIP() << "the command line is not built for this machine";
  }
};

TEST_F(Cli, OutputThatIsLostIsAFailure) {
  for (const char* command :
       {"doctor", "check --random 2", "check --random 2 --json", "check --list", "explain --model qwen3-8b",
        "explain --model qwen3-8b --json", "describe", "describe --schema", "describe --json", "--help", "--version",
        "check --help", "run --model smollm2-135m --tokens 1 --seconds 0.001"}) {
    for (const char* where : {"/dev/full", "&-"}) {
      const Ended ended = Command(Text(command, " >", where));
      EXPECT_EQ(ended.code, 2) << command << " >" << where << ": " << ended.said;
      EXPECT_NE(ended.said.find("ropewalk: "), std::string::npos) << command << " >" << where << ": " << ended.said;
    }
    EXPECT_EQ(Command(Text(command, " >/dev/null")).code, 0) << command;
  }
}

TEST_F(Cli, NumbersAreTakenAsTheyAreOrRefused) {
  for (const char* arguments :
       {"check --random 99999999999999999999 --list", "check --random 100000000 --list", "check --random 0 --list",
        "check --random -1 --list", "check --random 2 --seed 99999999999999999999 --list",
        "check --random 2 --seed -1 --list", "explain --tokens 99999999999", "explain --tokens 99999999999999999999",
        "check --threads 4294967297", "check --max-failures 99999999999999999999",
        "run --tokens 1,99999999999999999999"}) {
    const Ended ended = Command(arguments);
    EXPECT_EQ(ended.code, 2) << arguments << ": " << ended.said;
    EXPECT_NE(ended.said.find("must be a whole number from"), std::string::npos) << arguments << ": " << ended.said;
  }
  for (const char* shard : {"1", "1/", "/2", "2/2", "0/0", "-1/4", "1/-4", "99999999999999999999/4", "1/4x",
                            "1/99999999999999999999", "0x0/2", "' 1/2'"}) {
    const Ended ended = Command(Text("check --list --shard ", shard));
    EXPECT_EQ(ended.code, 2) << shard << ": " << ended.said;
    EXPECT_NE(ended.said.find("--shard must be K/N with K < N"), std::string::npos) << shard << ": " << ended.said;
  }
  EXPECT_EQ(Command("check --list --shard 1/4").code, 0);
  EXPECT_EQ(Command("check --random 2 --seed 18446744073709551615 --list").code, 0);
}

// What bash completes after these words, the last one begun: behind its last colon, as readline parts words there.
std::string Completed(const std::string& words) {
  const std::string script =
      Text("source <('", ROPEWALK_COMMAND, "' completion bash); COMP_WORDBREAKS=' :='; COMP_LINE='", words,
           "'; COMP_POINT=", words.size(), "; _ropewalk; echo \\${COMPREPLY[@]}");
  return Shell(Text("bash -c \"", script, "\" 2>&1")).said;
}

TEST_F(Cli, ShellsCompleteSubcommandsOptionsAndChoices) {
  if (Shell("bash -c true 2>&1").code != 0) GTEST_SKIP() << "no bash";
  EXPECT_EQ(Completed("ropewalk be"), "bench\n");
  EXPECT_EQ(Completed("ropewalk --v"), "--version\n");
  EXPECT_EQ(Completed("ropewalk tune --pairing n"), "neox\n");
  EXPECT_EQ(Completed("ropewalk tune --op rope+store:"), "fp8 k-only fp8:k-only\n");
  EXPECT_EQ(Completed("ropewalk tune --op rope+store:fp8:"), "k-only\n");
  EXPECT_EQ(Completed("ropewalk tune --pairing "), "neox interleaved\n");
  EXPECT_EQ(Completed("ropewalk completion z"), "zsh\n");
  EXPECT_NE(Completed("ropewalk check --").find("--random"), std::string::npos);
  EXPECT_EQ(Completed("ropewalk check --pairing n"), "\n") << "an option of another subcommand";
  EXPECT_EQ(Command("completion fish").code, 2);
  EXPECT_EQ(Command("completion zsh").said.find("#compdef ropewalk\n"), 0u);
}

TEST_F(Cli, TheManualHasEverySubcommandAndOption) {
  const Ended manual = Command("manual");
  EXPECT_EQ(manual.code, 0);
  const std::string help = Command("--help").said;
  size_t found = 0;
  for (const char* command :
       {"doctor", "run", "check", "bench", "explain", "compile", "tune", "describe", "completion", "manual"}) {
    EXPECT_NE(help.find(Text("\n  ", command, " ")), std::string::npos) << command;
    EXPECT_NE(manual.said.find(Text("\n.SS ", command, "\n")), std::string::npos) << command;
    const std::string options = Command(Text(command, " --help")).said;
    for (size_t at = options.find("\n  -"); at != std::string::npos; at = options.find("\n  -", at + 1)) {
      const size_t dashes = options.find("--", at), end = options.find_first_of(" ,\n", dashes);
      std::string name;
      for (const char c : options.substr(dashes, end - dashes)) name += c == '-' ? "\\-" : std::string(1, c);
      EXPECT_NE(manual.said.find(name), std::string::npos) << command << " " << name;
      ++found;
    }
  }
  EXPECT_GE(found, 30u);
}

TEST_F(Cli, AModelIsNotReadForEver) {
  const Ended ended = Command("explain --model /dev/zero");
  EXPECT_EQ(ended.code, 2);
  EXPECT_NE(ended.said.find("/dev/zero: is larger than 8 MiB"), std::string::npos) << ended.said;
}

TEST_F(Cli, WhatExplainSaysFits80Columns) {
  const Ended ended = Command("explain");
  EXPECT_EQ(ended.code, 0) << ended.said;
  std::istringstream lines(ended.said);
  int count = 0;
  for (std::string line; std::getline(lines, line); ++count) EXPECT_LE(line.size(), 80u) << line;
  EXPECT_GT(count, 100);
  const std::string qwen = Command("explain --model qwen3-8b").said;
  EXPECT_NE(qwen.find("\nQwen3-8B\n"), std::string::npos) << qwen;
  EXPECT_NE(qwen.find("\n  norm + rope + store in fp8: "), std::string::npos) << qwen;
}

TEST_F(Cli, TheSweepHasEveryPartWorstFirst) {
  const Ended ended =
      Command("bench --sweep --dtype f32 --op rope --pairing neox --tokens 1 --seconds 0.0001 --json - 2>/dev/null");
  EXPECT_EQ(ended.code, 0) << ended.said;
  const nlohmann::json sweep = nlohmann::json::parse(ended.said, nullptr, false);
  ASSERT_FALSE(sweep.is_discarded()) << ended.said;
  EXPECT_TRUE(sweep.at("held"));
  const auto& results = sweep.at("results");
  ASSERT_GE(results.size(), 100u);
  bool real = false;
  for (size_t i = 0; i < results.size(); ++i) {
    EXPECT_GT(results[i].at("us"), 0);
    if (i > 0) {
      EXPECT_LE(results[i].at("ratio"), results[i - 1].at("ratio"));
    }
    real |= results[i].at("rotary_dim") == 64 && results[i].at("rotary_offset") == 128;
    // A whole head costs as many lines a byte as 128 of 128; 8 of 32, 32 bytes of 128, twice as many.
    const double ratio = results[i].at("ratio"), line = results[i].at("line_ratio");
    if (results[i].at("rotary_dim") == results[i].at("head_dim") && results[i].at("head_dim") == 64) {
      EXPECT_NEAR(line, ratio, 1e-9 * ratio);
    }
    if (results[i].at("rotary_dim") == 8) {
      EXPECT_NEAR(2 * line, ratio, 1e-9 * ratio);
    }
  }
  EXPECT_TRUE(real);
}

TEST_F(Cli, TheSweepRefusesWhatItWouldPassOver) {
  for (const char* option : {"--threads 2", "--shape 1,2,2,64", "--model qwen3-8b", "--tokens 1,2"}) {
    const Ended ended = Command(Text("bench --sweep ", option));
    EXPECT_EQ(ended.code, 2) << option;
    EXPECT_NE(ended.said.find("--sweep has shapes of its own"), std::string::npos) << ended.said;
  }
  const Ended ended = Command("bench --sweep --backend cuda");
  EXPECT_EQ(ended.code, 2);
  EXPECT_NE(ended.said.find("--backend must be cpu or cpu:TARGET, but is cuda"), std::string::npos) << ended.said;
}

// Doctor tells of what would serve, not of what it finds by a search of its own.
TEST_F(Cli, DoctorTellsWhatWouldServe) {
  setenv("ROPEWALK_LIBNVRTC", "/nowhere/libnvrtc.so.13", 1);
  setenv("ROPEWALK_CACHE_DIR", "/nowhere/kernels", 1);
  const auto found = nlohmann::json::parse(Command("doctor --json").said);
  EXPECT_EQ(found["kernel_cache"].get<std::string>().rfind("/nowhere/kernels", 0), 0u) << found["kernel_cache"];
  for (const auto& tool : found["tools"]) {
    EXPECT_TRUE(tool["what"] != "NVRTC" || tool["found"] == false) << tool;
  }
  unsetenv("ROPEWALK_LIBNVRTC");
  unsetenv("ROPEWALK_CACHE_DIR");
}

// A target that is none is not passed over.
TEST_F(Cli, AWrongTargetInTheEnvironmentIsSaid) {
  for (const char* target : {"avx9", "sse", "AVX2", "cpu:avx2"}) {
    setenv("ROPEWALK_CPU_TARGET", target, 1);
    const std::string wanted = Text("ROPEWALK_CPU_TARGET: force_backend: the target of cpu must be one of ");
    const Ended doctor = Command("doctor --json");
    EXPECT_NE(doctor.said.find(wanted), std::string::npos) << doctor.said;
    const Ended explain = Command("explain --model qwen3-8b");
    EXPECT_NE(explain.code, 0);
    EXPECT_NE(explain.said.find(Text("but is \"", target, "\"")), std::string::npos) << explain.said;
    for (const char* command : {"run --tokens 1", "bench --tokens 1", "check --random 1", "check --random 1 --json"}) {
      const Ended ended = Command(command);
      EXPECT_EQ(ended.code, 2) << command;
      EXPECT_NE(ended.said.find(wanted), std::string::npos) << command << ": " << ended.said;
      EXPECT_EQ(ended.said.find("bug"), std::string::npos) << command << ": " << ended.said;
    }
  }
  unsetenv("ROPEWALK_CPU_TARGET");
}

// Whatever the case, and as `run` prints it; what is no model is told of the others.
TEST_F(Cli, ModelsHaveTheNamesThatAreSeen) {
  for (const char* name :
       {"qwen3-8b", "Qwen3-8B", "QWEN3-8B", "c4ai-command-r-v01", "FLUX.1-dev", "qwen3-8b,qwen3-8b"}) {
    const Ended ended = Command(Text("run --tokens 1 --seconds 0.001 --model ", name));
    EXPECT_EQ(ended.code, 0) << name << ": " << ended.said;
  }
  // A file of many by name, and what is wrong in one.
  const Ended all = Command(Text("explain --model ", ROPEWALK_MODELS_DIR, "/models.json"));
  EXPECT_EQ(all.code, 0) << all.said;
  for (const char* name : {"c4ai-command-r-v01", "SmolLM2-135M"}) EXPECT_NE(all.said.find(name), std::string::npos);
  const Ended broken = Shell(Text("d=$(mktemp -d) && echo '{\"tiny\": {}}' >$d/models.json && (exec '",
                                  ROPEWALK_COMMAND, "' explain --model $d/models.json) 2>&1; rm -r $d"));
  EXPECT_NE(broken.said.find("models.json: tiny: "), std::string::npos) << broken.said;
  const Ended hub = Command("run --model Qwen/Qwen2-7B");
  EXPECT_EQ(hub.code, 2);
  EXPECT_NE(hub.said.find("download its config.json"), std::string::npos) << hub.said;
  EXPECT_NE(hub.said.find("qwen3-8b"), std::string::npos) << hub.said;
  const Ended nowhere = Shell(Text("(ROPEWALK_MODELS=/nowhere '", ROPEWALK_COMMAND, "' run) 2>&1"));
  EXPECT_EQ(nowhere.code, 2);
  EXPECT_NE(nowhere.said.find("ROPEWALK_MODELS is /nowhere"), std::string::npos) << nowhere.said;
}

// A folder `models` of another project is not taken for ours.
TEST_F(Cli, AnotherProjectsModelsArePassedOver) {
  const Ended ended = Shell(Text("d=$(mktemp -d) && mkdir $d/models && echo '{}' >$d/models/foo.json && cd $d && (",
                                 "unset ROPEWALK_MODELS; '", ROPEWALK_COMMAND, "' run --tokens 1; rm -r $d) 2>&1"));
  EXPECT_EQ(ended.said.find("foo.json"), std::string::npos) << ended.said;
}

TEST_F(Cli, WordsThatAreNoneSayWhatWasMeant) {
  const auto says = [](const char* arguments, const char* words) {
    const Ended ended = Command(arguments);
    EXPECT_EQ(ended.code, 2) << arguments << ": " << ended.said;
    EXPECT_NE(ended.said.find(words), std::string::npos) << arguments << ": " << ended.said;
  };
  says("doctr", "did you mean ropewalk doctor?");
  says("chekc --list", "did you mean ropewalk check?");
  says("tune --shape 3,2,0,64 --op rope+store", "--op: a store needs k heads, but no shape has any");
  says("run qwen3-8b", "a model is given by --model qwen3-8b");
  says("bench --shape 16,32,8,127", "must have tokens and heads, and rotate an even number");
  says("bench --shape 16,32,8,128,130", "must have tokens and heads, and rotate an even number");
  says("bench --seconds 0.001 --shape 1,2,2,64 --json /nowhere/x.json", "cannot write /nowhere/x.json");
  EXPECT_EQ(Command("help").code, 0);
  EXPECT_EQ(Command("version").said, Command("--version").said);
  EXPECT_EQ(Command("-V").said, Command("--version").said);
  EXPECT_EQ(Command("-v").said, Command("--version").said);
  for (const char* dtype : {"fp16", "BF16", "Float32"}) {
    EXPECT_EQ(Command(Text("run --model smollm2-135m --tokens 1 --seconds 0.001 --dtype ", dtype)).code, 0) << dtype;
  }
}

// A table that wraps is no table.
TEST_F(Cli, TablesAndHelpFitATerminal) {
  for (const char* command :
       {"doctor", "run --tokens 1 --seconds 0.001", "bench --tokens 1 --dtype bf16 --seconds 0.001", "--help",
        "run --help", "bench --help", "check --help", "explain --help", "compile --help", "tune --help",
        "describe --help", "floor --help", "completion --help", "manual --help"}) {
    const std::string said = Command(command).said;
    for (size_t start = 0; start < said.size();) {
      const size_t end = std::min(said.find('\n', start), said.size());
      const std::string line = said.substr(start, end - start);
      const bool is_path = line.find(' ', line.find_first_not_of(' ')) == std::string::npos;  // cannot be broken
      EXPECT_TRUE(line.size() <= 80 || is_path || line.starts_with("CPU:") || line.starts_with("models:") ||
                  line.starts_with("CUDA cache:"))
          << command << ": " << line;
      start = end + 1;
    }
  }
}

TEST_F(Cli, BenchPrintsJsonLikeTheOthers) {
  const Ended ended = Command("bench --shape 1,2,2,64,32 --dtype bf16 --seconds 0.001 --threads 1 --json 2>/dev/null");
  const auto found = nlohmann::json::parse(ended.said, nullptr, false);
  ASSERT_FALSE(found.is_discarded()) << ended.said;
  EXPECT_EQ(found["results"][0]["label"], "2/2x64, 32 of it");
  EXPECT_TRUE(found["results"][0]["noisy"].is_boolean());
}

// A library that is there and no library is not told as missing.
TEST_F(Cli, AFileThatCannotBeLoadedIsNotMissing) {
  const std::string folder = Directory() + "/junk";
  for (const char* name : {"libcuda.so.1", "libOpenCL.so.1", "libze_loader.so.1"}) {
    std::filesystem::create_directories(folder);
    std::ofstream(folder + "/" + name) << "junk";
    const Ended ended = Shell(Text("unset ROPEWALK_LIBCUDA ROPEWALK_LIBOPENCL ROPEWALK_LIBZE_LOADER; LD_LIBRARY_PATH='",
                                   folder, "' '", ROPEWALK_COMMAND, "' doctor --json 2>&1"));
    EXPECT_NE(ended.said.find(Text(name, " cannot be opened: ", folder, "/", name)), std::string::npos) << ended.said;
    EXPECT_EQ(ended.said.find(Text(name, " was not found")), std::string::npos) << ended.said;
    std::filesystem::remove_all(folder);
  }
}

// A command on a terminal. Each of `cues`, once seen there, is answered by Ctrl-C.
struct Terminal {
  int code = -1, signal = 0;
  std::string shown, out;  // on the terminal (stderr), on stdout
};

Terminal OnTerminal(std::vector<std::string> arguments, const std::vector<std::string>& cues) {
  Terminal ended;
  const std::string out = Directory() + "/stdout";
  int terminal = -1;
  const pid_t child = forkpty(&terminal, nullptr, nullptr, nullptr);
  if (child < 0) throw std::runtime_error("no terminal can be had: is /dev/pts mounted?");
  if (child == 0) {
    std::signal(SIGINT, SIG_DFL);
    setenv("TERM", "xterm", 1);
    setenv("ROPEWALK_MODELS", ROPEWALK_MODELS_DIR, 1);
    const int file = open(out.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    dup2(file, STDOUT_FILENO);
    arguments.insert(arguments.begin(), ROPEWALK_COMMAND);
    std::vector<char*> words;
    std::ranges::transform(arguments, std::back_inserter(words), [](std::string& word) { return word.data(); });
    words.push_back(nullptr);
    execv(ROPEWALK_COMMAND, words.data());
    _exit(127);
  }
  size_t cue = 0, from = 0;
  char buffer[4096];
  for (ssize_t got; (got = read(terminal, buffer, sizeof(buffer))) > 0;) {  // until the other end is closed
    ended.shown.append(buffer, static_cast<size_t>(got));
    for (size_t at; cue < cues.size() && (at = ended.shown.find(cues[cue], from)) != std::string::npos; ++cue) {
      from = at + cues[cue].size();
      EXPECT_EQ(write(terminal, "\3", 1), 1);
    }
  }
  close(terminal);
  int status = -1;
  waitpid(child, &status, 0);
  if (WIFEXITED(status)) ended.code = WEXITSTATUS(status);
  if (WIFSIGNALED(status)) ended.signal = WTERMSIG(status);
  std::ifstream file(out);
  ended.out.assign(std::istreambuf_iterator<char>(file), {});
  return ended;
}

TEST_F(Cli, CtrlCKeepsWhatWasDone) {
  const auto interrupted = [](const std::vector<std::string>& arguments, const std::string& cue) {
    const Terminal ended = OnTerminal(arguments, {cue});
    EXPECT_EQ(ended.code, 130) << ended.shown;
    EXPECT_NE(ended.shown.find("interrupted: "), std::string::npos) << ended.shown;
    EXPECT_NE(ended.shown.find(" done\r\n"), std::string::npos) << ended.shown;
    return ended.out;
  };
  const auto parsed = [](const std::string& text) { return nlohmann::json::parse(text, nullptr, false); };

  const auto check = parsed(interrupted({"check", "--json"}, "check 2/"));
  ASSERT_FALSE(check.is_discarded());
  EXPECT_GE(check["run"], 1);
  EXPECT_LT(check["run"], check["asked"]);
  EXPECT_NE(interrupted({"check"}, "check 2/").find(" ran, 0 failed"), std::string::npos);

  const std::string csv = Directory() + "/bench.csv", json = Directory() + "/bench.json";
  const std::vector<std::string> bench = {"bench", "--tokens", "1", "--seconds", "0.02", "--csv", csv, "--json", json};
  EXPECT_NE(interrupted(bench, "bench 2/").find("of floor"), std::string::npos);
  std::ifstream json_file(json), csv_file(csv);
  const auto benched = parsed({std::istreambuf_iterator<char>(json_file), {}});
  ASSERT_FALSE(benched.is_discarded());
  EXPECT_GE(benched["results"].size(), 1u);
  EXPECT_LT(benched["results"].size(), benched["asked"]);
  const std::string lines{std::istreambuf_iterator<char>(csv_file), {}};
  EXPECT_EQ(static_cast<size_t>(std::ranges::count(lines, '\n')), 1 + benched["results"].size());

  const auto run = parsed(interrupted({"run", "--tokens", "1", "--seconds", "0.02", "--json"}, "run 2/"));
  ASSERT_FALSE(run.is_discarded());
  EXPECT_GE(run["results"].size(), 1u);
  EXPECT_LT(run["results"].size(), run["asked"]);

  const auto sweep = parsed(interrupted({"bench", "--sweep", "--seconds", "0.01", "--json"}, "sweep 2/"));
  ASSERT_FALSE(sweep.is_discarded());
  EXPECT_GE(sweep["results"].size(), 1u);
  EXPECT_LT(sweep["results"].size(), sweep["asked"]);
}

TEST_F(Cli, ASecondCtrlCEndsAtOnce) {
  const Terminal ended =
      OnTerminal({"bench", "--shape", "1,2,2,64", "--seconds", "1000"}, {"bench 1/", "Ctrl-C again ends at once"});
  EXPECT_EQ(ended.signal, SIGINT) << ended.shown;
}

}  // namespace
}  // namespace ropewalk
