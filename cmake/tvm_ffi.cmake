# tvm-ffi, as Python has it installed: the target tvm_ffi::shared, and its headers in tvm_ffi_includes.
# SPDX-License-Identifier: Apache-2.0

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
