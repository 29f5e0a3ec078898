# ropewalk_spirv(output): a C++ file with the SPIR-V modules of backends/spirv/kernel/rope.cl, one for each dtype and width of an access,
# with those of the gradient (backward.cl, sums.cl), and with the kernels' text (backends/spirv/modules.h). clang makes LLVM's bitcode, llvm-spirv of the same version SPIR-V;
# where they are missing, the file says so and the library is built without. Where zlib is, all is compressed. Included, this
# file defines the function and ROPEWALK_WITH_ZLIB; run as a script, it writes the output.
# SPDX-License-Identifier: Apache-2.0

# Its static library: nothing more to load. A cross-build's own zlib is seldom there.
if(NOT CMAKE_SCRIPT_MODE_FILE)
  set(ROPEWALK_WITH_ZLIB FALSE)
  if(NOT CMAKE_CROSSCOMPILING)
    set(ZLIB_USE_STATIC_LIBS ON)
    find_package(ZLIB QUIET)
    if(NOT ZLIB_FOUND)
      set(ZLIB_USE_STATIC_LIBS OFF)
      find_package(ZLIB QUIET)
    endif()
    set(ROPEWALK_WITH_ZLIB ${ZLIB_FOUND})
  endif()
  if(NOT ROPEWALK_WITH_ZLIB)
    message(STATUS "Without zlib (Debian, Ubuntu: apt-get install zlib1g-dev): the library will be 1.1 MB larger")
  endif()
endif()

function(ropewalk_spirv output)
  # Both must be of one version. 15 comes first: docs/results/intel-report.md is of its modules, and with pointers that have
  # no type, as later ones write them, OpenCL drivers have less practice. 16 has no translator on Debian.
  set(missing "no clang and llvm-spirv of one version (15, 14 or 17 to 19) were found when this Ropewalk was built (Debian 12, Ubuntu: apt-get install clang-15 llvm-spirv-15; Debian 13: clang-19 llvm-spirv-19)")
  foreach(version 15 14 19 18 17)
    find_program(ROPEWALK_OPENCL_CLANG_${version} clang-${version})
    find_program(ROPEWALK_LLVM_SPIRV_${version} llvm-spirv-${version})
    if(ROPEWALK_OPENCL_CLANG_${version} AND ROPEWALK_LLVM_SPIRV_${version})
      set(clang ${ROPEWALK_OPENCL_CLANG_${version}})
      set(translator ${ROPEWALK_LLVM_SPIRV_${version}})
      set(missing "")
      set(pointers "")
      if(version LESS 16)
        set(pointers -Xclang -no-opaque-pointers)
      endif()
      break()
    endif()
  endforeach()
  find_program(ROPEWALK_SPIRV_VAL spirv-val)

  # In the order in which the text without includes must have them. The kernels come last.
  set(kernel backends/spirv/kernel)
  set(kernels rope backward sums)
  set(sources rope/kernel_types.h rope/params.h rope/fault.h rope/sincos.h ${kernel}/args.h ${kernel}/index.h
    ${kernel}/vector.clh ${kernel}/sincos.clh ${kernel}/group.clh ${kernel}/sum.clh)
  foreach(name IN LISTS kernels)
    list(APPEND sources ${kernel}/${name}.cl)
  endforeach()
  set(inputs ${sources})
  list(TRANSFORM inputs PREPEND ${PROJECT_SOURCE_DIR}/)
  # LLVM's own passes stay off: they leave what the translator refuses.
  set(clang_flags -c -x cl -cl-std=CL3.0 -target spir64-unknown-unknown ${pointers} -Xclang
    -finclude-default-header -O1 -Xclang -disable-llvm-passes -ffp-contract=off -emit-llvm)
  set(translator_flags --spirv-max-version=1.2 --spirv-ext=+SPV_INTEL_subgroups --spirv-mem2reg)
  set(directory ${PROJECT_BINARY_DIR}/spirv)
  file(MAKE_DIRECTORY ${directory})
  set(names "")
  set(modules "")
  # Constants of rope/params.h: kRopeF32, kRopeF16, kRopeBF16. The gradient lacks the widths that few calls would have, as
  # each takes 12 KB of the library.
  foreach(module rope:float32:1:4 rope:float32:1:2 rope:float32:1:1
                 rope:float16:2:8 rope:float16:2:4 rope:float16:2:2 rope:float16:2:1
                 rope:bfloat16:3:8 rope:bfloat16:3:4 rope:bfloat16:3:2 rope:bfloat16:3:1
                 backward:float32:1:4 backward:float32:1:1
                 backward:float16:2:8 backward:float16:2:4 backward:float16:2:1
                 backward:bfloat16:3:8 backward:bfloat16:3:4 backward:bfloat16:3:1
                 sums:float32:1:1)
    if(missing)
      break()
    endif()
    string(REPLACE ":" ";" parts ${module})
    list(GET parts 0 file)
    list(GET parts 1 dtype_name)
    list(GET parts 2 dtype)
    list(GET parts 3 vector)
    list(FIND kernels ${file} number)
    set(name ${dtype_name}_v${vector})
    if(number GREATER 0)
      set(name ${file}_${name})
    endif()
    set(validate "")
    if(ROPEWALK_SPIRV_VAL)
      set(validate COMMAND ${ROPEWALK_SPIRV_VAL} --target-env opencl2.2 ${directory}/${name}.spv)
    endif()
    add_custom_command(OUTPUT ${directory}/${name}.spv VERBATIM
      COMMAND ${clang} ${clang_flags} -DROPE_DTYPE=${dtype} -DROPE_VECTOR=${vector} -I${PROJECT_SOURCE_DIR}
              ${PROJECT_SOURCE_DIR}/${kernel}/${file}.cl -o ${directory}/${name}.bc
      COMMAND ${translator} ${translator_flags} ${directory}/${name}.bc -o ${directory}/${name}.spv
      ${validate}
      DEPENDS ${inputs} COMMENT "SPIR-V ${name}")
    list(APPEND names ${name}:${number}:${dtype}:${vector})
    list(APPEND modules ${directory}/${name}.spv)
  endforeach()
  if(missing)
    message(STATUS "Without the kernels for Intel GPUs and OpenCL: ${missing}")
  endif()
  list(JOIN clang_flags " " clang_text)
  list(JOIN translator_flags " " translator_text)
  add_custom_command(OUTPUT ${output} VERBATIM
    COMMAND ${CMAKE_COMMAND} -DROOT=${PROJECT_SOURCE_DIR} -DDIRECTORY=${directory} -DOUTPUT=${output}
            "-DMODULES=${names}" "-DSOURCES=${sources}" "-DKERNELS=${kernels}" "-DMISSING=${missing}" -DGZIP=${ROPEWALK_WITH_ZLIB}
            "-DBUILT=clang ${clang_text}, llvm-spirv ${translator_text}" -P ${PROJECT_SOURCE_DIR}/cmake/spirv.cmake
    DEPENDS ${modules} ${inputs} ${PROJECT_SOURCE_DIR}/cmake/spirv.cmake
    COMMENT "Embedding the SPIR-V kernels")
endfunction()

if(NOT CMAKE_SCRIPT_MODE_FILE)
  return()
endif()

# The kernels as one text without includes, of which ROPE_ENTRY is built. Its first line says how the modules are made.
set(kernel "// ${BUILT}\n")
foreach(file IN LISTS SOURCES)
  file(READ ${ROOT}/${file} content)
  string(REGEX REPLACE "#include \"[^\n]*\n" "" content "${content}")
  get_filename_component(name ${file} NAME_WE)
  list(FIND KERNELS ${name} number)
  if(file MATCHES "[.]cl$")
    set(content "#if ROPE_ENTRY == ${number}\n${content}#endif\n")
  endif()
  string(APPEND kernel "${content}")
endforeach()
file(WRITE ${DIRECTORY}/rope.cl "${kernel}")

set(files "")
set(table "")
foreach(module IN LISTS MODULES)
  string(REPLACE ":" ";" parts ${module})
  list(GET parts 0 name)
  list(GET parts 1 entry)
  list(GET parts 2 dtype)
  list(GET parts 3 vector)
  file(SIZE ${DIRECTORY}/${name}.spv size)
  list(APPEND files ${DIRECTORY}/${name}.spv)
  string(APPEND table "    {\"${name}\", ${size}, ${entry}, ${dtype}, ${vector}},\n")
endforeach()
list(APPEND files ${DIRECTORY}/rope.cl)
file(SIZE ${DIRECTORY}/rope.cl size)
string(APPEND table "    {\"rope.cl\", ${size}, 0, 0, 0},\n")

# All files in one, each cut into so many chunks of a size: the first chunk of each, the second of each and so on. What files
# of one origin have in common comes so close together that gzip, whose memory is 32 KB, finds it: the modules take half of
# what they take one after the other. 48 and 64 chunks compress alike, fewer and more worse.
set(chunks 48)
set(pack ${DIRECTORY}/pack)
set(interleave [[
output=$1 chunks=$2
shift 2
: >"$output"
i=0
while [ "$i" -lt "$chunks" ]; do
  for file in "$@"; do
    size=$(wc -c <"$file")
    dd if="$file" bs=$(((size + chunks - 1) / chunks)) skip="$i" count=1 2>/dev/null >>"$output"
  done
  i=$((i + 1))
done
]])
execute_process(COMMAND sh -euc "${interleave}" interleave ${pack} ${chunks} ${files} COMMAND_ERROR_IS_FATAL ANY)
set(gzip false)
if(GZIP)
  set(gzip true)
  execute_process(COMMAND gzip -9nc ${pack} OUTPUT_FILE ${pack}.gz COMMAND_ERROR_IS_FATAL ANY)
  set(pack ${pack}.gz)
endif()
file(READ ${pack} bytes HEX)
string(REGEX REPLACE "(..)" "0x\\1," bytes "${bytes}")
string(REGEX REPLACE "(0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,0x..,)" "\\1\n" bytes "${bytes}")
file(WRITE ${OUTPUT} "// Written by cmake/spirv.cmake.
#include \"backends/spirv/plan.h\"
#include \"backends/spirv/modules.h\"

namespace ropewalk {
namespace {

constexpr SpirvPackPart kParts[] = {
${table}};
constexpr uint8_t kBytes[] = {
${bytes}};

}  // namespace

extern const SpirvPack kSpirvPack = {kBytes, ${gzip}, ${chunks}, kParts};
const char* RopeSpirvMissing() { return \"${MISSING}\"; }

}  // namespace ropewalk
")
