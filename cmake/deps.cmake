# What we build on. All of it is headers; nothing here is needed at run time.
# SPDX-License-Identifier: Apache-2.0

find_package(Threads REQUIRED)

# ropewalk_header_library(name header package [directories..]): an interface target for a library of headers.
function(ropewalk_header_library name header package)
  find_path(${name}_INCLUDE_DIR ${header} HINTS ${ARGN})
  mark_as_advanced(${name}_INCLUDE_DIR)
  if(NOT ${name}_INCLUDE_DIR)
    message(FATAL_ERROR "Ropewalk needs <${header}>, which was not found. "
      "On Debian and Ubuntu: apt-get install ${package}. Elsewhere: -D${name}_INCLUDE_DIR=DIRECTORY.")
  endif()
  add_library(${name} INTERFACE)
  set(directory ${${name}_INCLUDE_DIR})
  if(CMAKE_CROSSCOMPILING)
    # /usr/include is the build machine's: let in this library alone.
    string(REGEX MATCH "^[^/]+" folder ${header})
    set(directory ${PROJECT_BINARY_DIR}/headers/${name})
    file(MAKE_DIRECTORY ${directory})
    file(CREATE_LINK ${${name}_INCLUDE_DIR}/${folder} ${directory}/${folder} SYMBOLIC)
  endif()
  # System headers: their warnings are not ours. The default directories must not be named to the compiler again.
  if(NOT directory IN_LIST CMAKE_CXX_IMPLICIT_INCLUDE_DIRECTORIES)
    target_include_directories(${name} SYSTEM INTERFACE $<BUILD_INTERFACE:${directory}>)
  endif()
endfunction()

ropewalk_header_library(ropewalk_dlpack dlpack/dlpack.h libdlpack-dev)
ropewalk_header_library(ropewalk_highway hwy/highway.h libhwy-dev)
ropewalk_header_library(ropewalk_json nlohmann/json.hpp nlohmann-json3-dev)

# Releases before 1.0 lack operations that the CPU kernels use.
file(STRINGS ${ropewalk_highway_INCLUDE_DIR}/hwy/base.h highway_major REGEX "#define HWY_MAJOR ")
file(STRINGS ${ropewalk_highway_INCLUDE_DIR}/hwy/highway.h highway_major_old REGEX "#define HWY_MAJOR ")
string(REGEX MATCH "[0-9]+" highway_major "${highway_major}${highway_major_old}")
if(highway_major LESS 1)
  message(FATAL_ERROR "Ropewalk needs Highway 1.0 or newer, but ${ropewalk_highway_INCLUDE_DIR} holds an older one")
endif()

if(ROPEWALK_CLI)
  ropewalk_header_library(ropewalk_cli11 CLI/CLI.hpp libcli11-dev)
  ropewalk_header_library(ropewalk_fmt fmt/format.h libfmt-dev)
  target_compile_definitions(ropewalk_fmt INTERFACE FMT_HEADER_ONLY)
endif()
