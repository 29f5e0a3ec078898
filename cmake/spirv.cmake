# ropewalk_spirv(output): a C++ file with the SPIR-V modules of ops/rope/rope.cl, one for each dtype and width of an access,
# and with the kernel's text (ops/rope/rope_spirv.h). clang makes LLVM's bitcode, llvm-spirv of the same version SPIR-V;
# where they are missing, the file says so and the library is built without. Included, this file defines the function; run
# as a script, it writes the output.
# SPDX-License-Identifier: Apache-2.0

function(ropewalk_spirv output)
  # 16 and later write bitcode that their translators refuse (or have none on Debian); both must be of one version.
  set(missing "clang-15 and llvm-spirv-15 were not found when this Ropewalk was built (Debian, Ubuntu: apt-get install clang-15 llvm-spirv-15)")
  foreach(version 15 14)
    find_program(ROPEWALK_OPENCL_CLANG_${version} clang-${version})
    find_program(ROPEWALK_LLVM_SPIRV_${version} llvm-spirv-${version})
    if(ROPEWALK_OPENCL_CLANG_${version} AND ROPEWALK_LLVM_SPIRV_${version})
      set(clang ${ROPEWALK_OPENCL_CLANG_${version}})
      set(translator ${ROPEWALK_LLVM_SPIRV_${version}})
      set(missing "")
      break()
    endif()
  endforeach()
  find_program(ROPEWALK_SPIRV_VAL spirv-val)

  # In the order in which the text without includes must have them.
  set(sources kernels/kernel_types.h ops/rope/rope_params.h
    ops/rope/rope_fault.h ops/rope/rope_spirv_args.h kernels/opencl/vector.clh kernels/opencl/angle.clh ops/rope/rope.cl)
  set(inputs ${sources})
  list(TRANSFORM inputs PREPEND ${PROJECT_SOURCE_DIR}/)
  set(directory ${PROJECT_BINARY_DIR}/spirv)
  file(MAKE_DIRECTORY ${directory})
  set(names "")
  set(modules "")
  # Constants of rope_params.h: kRopeF32, kRopeF16, kRopeBF16.
  foreach(module float32:1:4 float32:1:2 float32:1:1 float16:2:8 float16:2:4 float16:2:2 float16:2:1
                 bfloat16:3:8 bfloat16:3:4 bfloat16:3:2 bfloat16:3:1)
    if(missing)
      break()
    endif()
    string(REPLACE ":" ";" parts ${module})
    list(GET parts 0 dtype_name)
    list(GET parts 1 dtype)
    list(GET parts 2 vector)
    set(name ${dtype_name}_v${vector})
    set(validate "")
    if(ROPEWALK_SPIRV_VAL)
      set(validate COMMAND ${ROPEWALK_SPIRV_VAL} --target-env opencl2.2 ${directory}/${name}.spv)
    endif()
    # LLVM's own passes stay off: they leave what the translator refuses.
    add_custom_command(OUTPUT ${directory}/${name}.spv VERBATIM
      COMMAND ${clang} -c -x cl -cl-std=CL3.0 -target spir64-unknown-unknown -Xclang -no-opaque-pointers
              -Xclang -finclude-default-header -O1 -Xclang -disable-llvm-passes -ffp-contract=off -emit-llvm
              -DROPE_DTYPE=${dtype} -DROPE_VECTOR=${vector} -I${PROJECT_SOURCE_DIR}
              ${PROJECT_SOURCE_DIR}/ops/rope/rope.cl -o ${directory}/${name}.bc
      COMMAND ${translator} --spirv-max-version=1.2 --spirv-ext=+SPV_INTEL_subgroups --spirv-mem2reg
              ${directory}/${name}.bc -o ${directory}/${name}.spv
      ${validate}
      DEPENDS ${inputs} COMMENT "SPIR-V ${name}")
    list(APPEND names ${name}:${dtype}:${vector})
    list(APPEND modules ${directory}/${name}.spv)
  endforeach()
  if(missing)
    message(STATUS "Without the kernels for Intel GPUs and OpenCL: ${missing}")
  endif()
  add_custom_command(OUTPUT ${output} VERBATIM
    COMMAND ${CMAKE_COMMAND} -DROOT=${PROJECT_SOURCE_DIR} -DDIRECTORY=${directory} -DOUTPUT=${output}
            "-DMODULES=${names}" "-DSOURCES=${sources}" "-DMISSING=${missing}" -P ${PROJECT_SOURCE_DIR}/cmake/spirv.cmake
    DEPENDS ${modules} ${inputs} ${PROJECT_SOURCE_DIR}/cmake/spirv.cmake COMMENT "Embedding the SPIR-V kernels")
endfunction()

if(NOT CMAKE_SCRIPT_MODE_FILE)
  return()
endif()

set(text "// Written by cmake/spirv.cmake.\n#include \"ops/rope/rope_spirv.h\"\n\nnamespace ropewalk {\nnamespace {\n\n")
set(table "")
foreach(module IN LISTS MODULES)
  string(REPLACE ":" ";" parts ${module})
  list(GET parts 0 name)
  list(GET parts 1 dtype)
  list(GET parts 2 vector)
  file(READ ${DIRECTORY}/${name}.spv bytes HEX)
  # Words of the file's own order, so that the compiler has a quarter of the tokens to read; aligned as drivers want it.
  string(REGEX REPLACE "(..)(..)(..)(..)" "0x\\4\\3\\2\\1," words "${bytes}")
  string(REGEX REPLACE "(0x[^,]*,0x[^,]*,0x[^,]*,0x[^,]*,0x[^,]*,0x[^,]*,0x[^,]*,0x[^,]*,)" "\\1\n" words "${words}")
  string(APPEND text "constexpr uint32_t k_${name}[] = {\n${words}};\n")
  string(APPEND table "    {\"${name}\", reinterpret_cast<const uint8_t*>(k_${name}), sizeof(k_${name}), ${dtype}, ${vector}},\n")
endforeach()
set(kernel "")
foreach(file IN LISTS SOURCES)
  file(READ ${ROOT}/${file} content)
  string(FIND "${content}" ")ropewalk\"" clash)
  if(NOT clash EQUAL -1)
    message(FATAL_ERROR "${file} contains the text )ropewalk\", which ends an embedded file")
  endif()
  string(REGEX REPLACE "#include \"[^\n]*\n" "" content "${content}")
  # One literal for each file: a compiler need not take more than 65,536 characters in one.
  string(APPEND kernel "    R\"ropewalk(${content})ropewalk\"\n")
endforeach()
if(table)
  string(APPEND text "\nconst SpirvModule kModules[] = {\n${table}};\n\n}  // namespace\n\n"
    "std::span<const SpirvModule> RopeSpirvModules() { return kModules; }\n")
else()
  string(APPEND text "}  // namespace\n\nstd::span<const SpirvModule> RopeSpirvModules() { return {}; }\n")
endif()
string(APPEND text "const char* RopeSpirvMissing() { return \"${MISSING}\"; }\n"
  "const char* RopeOpenClSource() {\n  return\n${kernel};\n}\n\n}  // namespace ropewalk\n")
file(WRITE ${OUTPUT} "${text}")
