# Fuzzing: each fuzz/NAME_fuzz.cc defines LLVMFuzzerTestOneInput; its corpus is fuzz/corpus/NAME_fuzz/.
# ROPEWALK_FUZZ: programs of libFuzzer, by clang. ROPEWALK_TESTS: the same files with fuzz/replay.cc, by any compiler,
# which run every file of the corpus once as a test.
# SPDX-License-Identifier: Apache-2.0

file(GLOB fuzz_sources CONFIGURE_DEPENDS fuzz/*_fuzz.cc)
if(ROPEWALK_FUZZ AND NOT CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
  message(FATAL_ERROR "ROPEWALK_FUZZ needs clang, but the compiler is ${CMAKE_CXX_COMPILER_ID}; try: make fuzz")
endif()

add_custom_target(fuzz)
foreach(source IN LISTS fuzz_sources)
  get_filename_component(name ${source} NAME_WE)
  if(ROPEWALK_FUZZ)
    add_executable(${name} ${source})
    target_link_options(${name} PRIVATE -fsanitize=fuzzer)
    target_link_libraries(${name} PRIVATE ropewalk_conformance ropewalk_flags)
    set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/fuzz)
    add_dependencies(fuzz ${name})
  endif()
  if(ROPEWALK_TESTS)
    add_executable(${name}_replay ${source} fuzz/replay.cc)
    target_link_libraries(${name}_replay PRIVATE ropewalk_conformance ropewalk_flags)
    add_test(NAME ${name}_replay COMMAND ${name}_replay ${PROJECT_SOURCE_DIR}/fuzz/corpus/${name})
    set_tests_properties(${name}_replay PROPERTIES LABELS fuzz TIMEOUT 600)
  endif()
endforeach()
