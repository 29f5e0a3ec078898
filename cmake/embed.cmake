# ropewalk_embed(output FILES device files.. [DIGEST more files..]): a C++ file with the text of the device files
# (backends/cuda/nvrtc.h), and one digest of it and of the other files that decide what is compiled. Comments are left
# out: they cost the library no bytes, and a change of one makes no kernel anew. Every line keeps its number. Included,
# this file defines the function; run as a script, it writes the output.
# SPDX-License-Identifier: Apache-2.0

function(ropewalk_embed output)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "FILES;DIGEST")
  set(inputs ${arg_FILES} ${arg_DIGEST})
  list(TRANSFORM inputs PREPEND ${PROJECT_SOURCE_DIR}/)
  add_custom_command(OUTPUT ${output} VERBATIM
    COMMAND ${CMAKE_COMMAND} -DROOT=${PROJECT_SOURCE_DIR} -DOUTPUT=${output} "-DFILES=${arg_FILES}"
            "-DDIGEST=${arg_DIGEST}" -P ${PROJECT_SOURCE_DIR}/cmake/embed.cmake
    DEPENDS ${inputs} ${PROJECT_SOURCE_DIR}/cmake/embed.cmake COMMENT "Embedding the CUDA kernels")
endfunction()

if(NOT CMAKE_SCRIPT_MODE_FILE)
  return()
endif()

set(text "// Written by cmake/embed.cmake.\n#include \"backends/cuda/nvrtc.h\"\n\nnamespace ropewalk {\n\n")
string(APPEND text "extern const CudaSource kCudaSources[] = {\n")
set(digests "")
list(LENGTH FILES count)
foreach(file IN LISTS FILES)
  file(READ ${ROOT}/${file} content)
  string(REGEX REPLACE "\n[ \t]*//[^\n]*" "\n" content "\n${content}")
  string(REGEX REPLACE "  // [^\n]*" "" content "${content}")
  string(REGEX REPLACE " +\n" "\n" content "${content}")
  string(SUBSTRING "${content}" 1 -1 content)
  string(SHA256 digest "${content}")
  string(APPEND digests "${file} ${digest}\n")
  string(FIND "${content}" ")ropewalk\"" clash)
  if(NOT clash EQUAL -1)
    message(FATAL_ERROR "${file} contains the text )ropewalk\", which ends an embedded file")
  endif()
  string(APPEND text "    {\"${file}\", R\"ropewalk(${content})ropewalk\"},\n")
endforeach()
foreach(file IN LISTS DIGEST)
  file(SHA256 ${ROOT}/${file} digest)
  string(APPEND digests "${file} ${digest}\n")
endforeach()
string(SHA256 digest "${digests}")
string(APPEND text "};\nextern const size_t kCudaSourceCount = ${count};\n"
  "extern const char kCudaSourceDigest[] = \"${digest}\";\n\n}  // namespace ropewalk\n")
file(WRITE ${OUTPUT} "${text}")
