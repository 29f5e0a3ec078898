# Flags of our own targets (never passed on to users): warnings, sanitizers, run-time libraries, exported symbols.
# SPDX-License-Identifier: Apache-2.0

add_library(ropewalk_flags INTERFACE)
target_compile_options(ropewalk_flags INTERFACE -Wall -Wextra -Wconversion -Wshadow)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  target_compile_options(ropewalk_flags INTERFACE -Wno-restrict)  # false for std::string = "..": GCC's bug 105651
  if(ROPEWALK_SANITIZE STREQUAL "thread")
    target_compile_options(ropewalk_flags INTERFACE -Wno-free-nonheap-object)  # false for a copy of a std::vector there
  endif()
endif()
# a * b + c rounds twice unless it says fma: frequencies, tables and the reference are the same on every CPU.
target_compile_options(ropewalk_flags INTERFACE -ffp-contract=off)
target_compile_options(ropewalk_flags INTERFACE -ffunction-sections -fdata-sections)
target_link_options(ropewalk_flags INTERFACE LINKER:--gc-sections)
if(ROPEWALK_WERROR)
  target_compile_options(ropewalk_flags INTERFACE -Werror)
endif()

# What makes a fault of ours, or a caller's, end in a stop rather than in memory written by another. A frame that is larger
# than a page touches each of its pages, so that it cannot step over a small stack's guard.
if(NOT ROPEWALK_SANITIZE)
  include(CheckCXXCompilerFlag)
  foreach(flag -fstack-protector-strong -fstack-clash-protection)
    string(MAKE_C_IDENTIFIER "ROPEWALK_HAS${flag}" has)
    check_cxx_compiler_flag("${flag} -Werror" ${has})
    if(${has})
      target_compile_options(ropewalk_flags INTERFACE ${flag})
    endif()
  endforeach()
  target_compile_options(ropewalk_flags INTERFACE
    $<$<NOT:$<CONFIG:Debug>>:-U_FORTIFY_SOURCE> $<$<NOT:$<CONFIG:Debug>>:-D_FORTIFY_SOURCE=2>)
endif()
target_link_options(ropewalk_flags INTERFACE LINKER:-z,relro LINKER:-z,now LINKER:-z,noexecstack)

if(ROPEWALK_SANITIZE)
  # For every target, so that test frameworks in header form are covered too.
  add_compile_options(-fsanitize=${ROPEWALK_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g)
  add_link_options(-fsanitize=${ROPEWALK_SANITIZE})
elseif(ROPEWALK_STATIC_RUNTIME)
  # libgcc_s.so.1 stays: it is everywhere, and its static twin would ask for glibc 2.35.
  target_link_options(ropewalk_flags INTERFACE -static-libstdc++ LINKER:--exclude-libs,ALL)
endif()

if(ROPEWALK_FUZZ)
  add_compile_options(-fsanitize=fuzzer-no-link)  # coverage of the library too
endif()

# Compiles all files of a target as one: libraries made of headers (JSON, formatting, the command line's parser) are most of
# what is compiled, and are read and compiled once. The command's 15 files took 170 s of a core, and take 25.
function(ropewalk_one_unit target)
  set_target_properties(${target} PROPERTIES UNITY_BUILD ${ROPEWALK_ONE_UNIT} UNITY_BUILD_BATCH_SIZE 0)
endfunction()

# For what waits on others.
function(ropewalk_little_optimised target)
  target_compile_options(${target} PRIVATE $<$<CONFIG:Release>:-O1>)
endfunction()

# Exports only the symbols of the patterns given, whatever static libraries are linked in.
function(ropewalk_export_only target)
  list(JOIN ARGN "; " patterns)
  set(script ${PROJECT_BINARY_DIR}/${target}.map)
  file(CONFIGURE OUTPUT ${script} CONTENT "{ global: @patterns@; local: *; };\n" @ONLY)
  target_link_options(${target} PRIVATE LINKER:--version-script=${script} LINKER:--no-undefined LINKER:-Bsymbolic)
  set_property(TARGET ${target} APPEND PROPERTY LINK_DEPENDS ${script})
endfunction()
