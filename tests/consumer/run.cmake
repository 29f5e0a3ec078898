# Installs the build into a fresh prefix, then configures, builds and tests the consumer against that prefix alone.
# SPDX-License-Identifier: Apache-2.0

# run(what command..): fails with everything that was said.
function(run what)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  message("${output}")
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${what} failed (${result})")
  endif()
endfunction()

file(REMOVE_RECURSE ${WORK})
set(prefix ${WORK}/prefix)
set(flags "")
if(SANITIZE)
  set(flags "-fsanitize=${SANITIZE}")
endif()

run("cmake --install" ${CMAKE_COMMAND} --install ${BUILD} --prefix ${prefix})
run("configuring the consumer" ${CMAKE_COMMAND} -G ${GENERATOR} -DCMAKE_MAKE_PROGRAM=${MAKE} -S ${SOURCE} -B ${WORK}/build
  -DCMAKE_PREFIX_PATH=${prefix} -DEXAMPLES=${SOURCE}/../../examples -DCMAKE_C_COMPILER=${C} -DCMAKE_CXX_COMPILER=${CXX}
  "-DCMAKE_C_FLAGS=${flags}" "-DCMAKE_CXX_FLAGS=${flags}")
run("building the consumer" ${CMAKE_COMMAND} --build ${WORK}/build)
run("running the consumer" ${CMAKE_CTEST_COMMAND} --test-dir ${WORK}/build --output-on-failure --no-tests=error)

# The command line and the models came along, and the command line finds them from anywhere.
foreach(file ${BIN}/ropewalk ${DATA}/ropewalk/models)
  if(NOT EXISTS ${prefix}/${file})
    message(FATAL_ERROR "cmake --install left out ${file}")
  endif()
endforeach()
run("the installed command line" ${CMAKE_COMMAND} -E chdir / ${prefix}/${BIN}/ropewalk doctor)
