// SPDX-License-Identifier: Apache-2.0
#include "base/files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>

namespace ropewalk {
namespace {

class File {
 public:
  explicit File(int file) : file_(file) {}
  ~File() {
    if (file_ >= 0) close(file_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int get() const { return file_; }

 private:
  int file_;
};

// "" if no one else could have written it. `what`: "it", "its directory".
std::string Distrust(const struct stat& status, const char* what) {
  if (status.st_uid != geteuid() && status.st_uid != 0) {
    return Text(what, " belongs to another user (", status.st_uid, "), but this process is of ", geteuid());
  }
  if (status.st_mode & (S_IWGRP | S_IWOTH)) return Text("others may write ", what, " (chmod go-w)");
  return "";
}

// The directory of a file that is to be trusted, opened.
std::string OpenDirectory(const std::string& path, int* directory) {
  *directory = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (*directory < 0) return Text("it cannot be read: ", std::strerror(errno));
  struct stat status = {};
  if (fstat(*directory, &status) != 0) return Text("its directory cannot be looked at: ", std::strerror(errno));
  return Distrust(status, "its directory");
}

std::string DirectoryOf(const std::string& path) {
  const size_t slash = path.find_last_of('/');
  return slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
}

}  // namespace

std::string ReadFile(const std::string& path, Trust trust, size_t most, std::string* bytes) {
  int opened = AT_FDCWD;
  std::string name = path;
  if (trust == Trust::kOwn) {
    std::string why = OpenDirectory(DirectoryOf(path), &opened);
    if (!why.empty()) {
      if (opened >= 0) close(opened);
      return why;
    }
    name = path.substr(path.find_last_of('/') + 1);  // in the directory that was looked at
  }
  const File directory(opened == AT_FDCWD ? -1 : opened);
  // Not waiting for the writer of a FIFO.
  const File file(openat(opened, name.c_str(), O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC));
  if (file.get() < 0) return Text("it cannot be read: ", std::strerror(errno));
  struct stat status = {};
  if (fstat(file.get(), &status) != 0) return Text("it cannot be looked at: ", std::strerror(errno));
  if (!S_ISREG(status.st_mode)) return "it is no regular file";
  if (trust == Trust::kOwn) {
    if (std::string why = Distrust(status, "it"); !why.empty()) return why;
  }
  if (static_cast<uint64_t>(status.st_size) > most) {
    return Text("it is larger than ", most >> 20, " MiB");
  }
  bytes->resize(static_cast<size_t>(status.st_size));
  for (size_t done = 0; done < bytes->size();) {
    const ssize_t got = read(file.get(), bytes->data() + done, bytes->size() - done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return Text("it cannot be read: ", std::strerror(errno));
    if (got == 0) return "it was cut short meanwhile";
    done += static_cast<size_t>(got);
  }
  return "";
}

std::string MakeOwnDirectory(const std::string& path, unsigned mode) {
  for (size_t at = 0; at != std::string::npos;) {
    at = path.find('/', at + 1);
    const std::string part = path.substr(0, at);
    if (mkdir(part.c_str(), mode) == 0) continue;
    const int error = errno;
    struct stat status = {};
    if (stat(part.c_str(), &status) != 0 || !S_ISDIR(status.st_mode)) {
      return Text("cannot create ", part, ": ", std::strerror(error));
    }
  }
  return WhyDirectoryIsNotTrusted(path);
}

std::string WhyDirectoryIsNotTrusted(const std::string& path) {
  struct stat status = {};
  return stat(path.c_str(), &status) == 0 ? Distrust(status, "it") : "";
}

Status PublishFile(const std::string& path, std::string_view bytes, unsigned mode) {
  static std::atomic<unsigned> count{0};
  const std::string temporary = Text(path, ".", getpid(), ".", count.fetch_add(1), ".tmp");
  const auto failed = [&](const char* what) {
    return Status::Driver(Text("cannot ", what, " ", temporary, ": ", std::strerror(errno)));
  };
  const int file = open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
  if (file < 0) return failed("create");
  Status status;
  for (size_t done = 0; status.ok() && done < bytes.size();) {
    const ssize_t put = write(file, bytes.data() + done, bytes.size() - done);
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0)
      status = failed("write");
    else
      done += static_cast<size_t>(put);
  }
  if (status.ok() && fsync(file) != 0) status = failed("flush");
  close(file);
  if (status.ok() && rename(temporary.c_str(), path.c_str()) != 0) status = failed("rename");
  if (!status.ok()) unlink(temporary.c_str());
  return status;
}

Digest DigestOf(std::string_view bytes) {
  using uint128 = unsigned __int128;
  constexpr uint128 kPrime = (static_cast<uint128>(1) << 88) + 0x13b;
  uint128 hash = (static_cast<uint128>(0x6c62272e07bb0142u) << 64) + 0x62b821756295c58du;
  for (const char byte : bytes) hash = (hash ^ static_cast<uint8_t>(byte)) * kPrime;
  Digest digest;
  for (size_t i = 0; i < digest.size(); ++i) digest[i] = static_cast<uint8_t>(hash >> (120 - 8 * i));
  return digest;
}

}  // namespace ropewalk
