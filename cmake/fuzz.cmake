# Fuzzing: each fuzz/NAME_fuzz.cc defines LLVMFuzzerTestOneInput; its corpus is NAME_fuzz/ of fuzz/corpus.tar.xz.
# ROPEWALK_FUZZ: programs of libFuzzer, by clang. ROPEWALK_TESTS: the same files with fuzz/replay.cc, by any compiler,
# which run every file of the corpus once as a test.
# SPDX-License-Identifier: Apache-2.0

file(GLOB fuzz_sources CONFIGURE_DEPENDS fuzz/*_fuzz.cc)
if(ROPEWALK_FUZZ AND NOT CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
  message(FATAL_ERROR "ROPEWALK_FUZZ needs clang, but the compiler is ${CMAKE_CXX_COMPILER_ID}; try: make fuzz")
endif()

# border_fuzz.cc is of the Python module, and is built where tvm-ffi is there for it.
if(ROPEWALK_FUZZ)
  find_library(ROPEWALK_LIBHWY hwy REQUIRED)
  ropewalk_find_tvm_ffi()
elseif(NOT ROPEWALK_PYTHON)
  list(FILTER fuzz_sources EXCLUDE REGEX "/border_fuzz.cc$")
endif()

# fuzz_target NAME SOURCE..: a program over the library; that of border_fuzz.cc with the Python module in it.
function(fuzz_target name)
  add_executable(${name} ${ARGN})
  target_link_libraries(${name} PRIVATE ropewalk_conformance ropewalk_flags)
  if(ROPEWALK_FUZZ)
    target_link_libraries(${name} PRIVATE ${ROPEWALK_LIBHWY})  # clang tells it of AddressSanitizer, and it asserts
  endif()
  if(name MATCHES "^border_fuzz")
    target_sources(${name} PRIVATE bindings/python/module.cc)
    target_include_directories(${name} SYSTEM PRIVATE ${tvm_ffi_includes})
    target_link_libraries(${name} PRIVATE tvm_ffi::shared ${CMAKE_DL_LIBS})
  endif()
endfunction()

# 1,600 small files are one in git.
set(fuzz_corpus ${PROJECT_BINARY_DIR}/seeds)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/fuzz/corpus.tar.xz)
file(REMOVE_RECURSE ${fuzz_corpus})
file(ARCHIVE_EXTRACT INPUT ${PROJECT_SOURCE_DIR}/fuzz/corpus.tar.xz DESTINATION ${fuzz_corpus})

add_custom_target(fuzz)
foreach(source IN LISTS fuzz_sources)
  get_filename_component(name ${source} NAME_WE)
  if(ROPEWALK_FUZZ)
    fuzz_target(${name} ${source})
    target_link_options(${name} PRIVATE -fsanitize=fuzzer)
    set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/fuzz)
    add_dependencies(fuzz ${name})
  endif()
  if(ROPEWALK_TESTS)
    fuzz_target(${name}_replay ${source} fuzz/replay.cc)
    add_test(NAME ${name}_replay COMMAND ${name}_replay ${fuzz_corpus}/${name})
    set_tests_properties(${name}_replay PROPERTIES LABELS fuzz TIMEOUT 600)
  endif()
endforeach()
