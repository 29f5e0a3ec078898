# What we build on. All of it is headers, and nothing is needed at run time, but tvm-ffi by the Python module.
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

# For the Python module: tvm-ffi, as Python has it installed, is the target tvm_ffi::shared, its headers tvm_ffi_includes.
macro(ropewalk_find_tvm_ffi)
  find_package(Python COMPONENTS Interpreter REQUIRED)
  if(NOT tvm_ffi_ROOT)
    # Found without importing it: the import would pull in torch where that is installed.
    execute_process(OUTPUT_VARIABLE tvm_ffi_package OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND ${Python_EXECUTABLE} -c
      "import importlib.util as u; s = u.find_spec('tvm_ffi'); print(s.submodule_search_locations[0] if s else '')")
    if(NOT tvm_ffi_package)
      message(FATAL_ERROR "${Python_EXECUTABLE} has no apache-tvm-ffi. Run: ${Python_EXECUTABLE} -m pip install apache-tvm-ffi")
    endif()
    set(tvm_ffi_ROOT ${tvm_ffi_package}/share/cmake/tvm_ffi)
  endif()
  find_package(tvm_ffi CONFIG REQUIRED)
  get_target_property(tvm_ffi_includes tvm_ffi::shared INTERFACE_INCLUDE_DIRECTORIES)
  # In a cross-build the library is that of another machine's package; the headers are the same.
  set(ROPEWALK_TVM_FFI_LIBRARY "" CACHE FILEPATH "libtvm_ffi.so of the machine that is built for, if not this one's")
  if(ROPEWALK_TVM_FFI_LIBRARY)
    set_target_properties(tvm_ffi::shared PROPERTIES IMPORTED_LOCATION ${ROPEWALK_TVM_FFI_LIBRARY})
  endif()
endmacro()
