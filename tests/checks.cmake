# Checks of what was built, as a script: cmake -DCHECK=NAME .. -P checks.cmake.
#   size        the LIBRARY, stripped by STRIP into COPY, has at most MOST bytes
#   hardening   the LIBRARY cannot have its jump tables or its stack rewritten, nor be unloaded while threads are in it
#   page        the page PAGE of the docs is what COMMAND (a list) prints now
#   consumer    BUILD, installed into a fresh prefix, lets a project configure, build and run against that prefix alone
# SPDX-License-Identifier: Apache-2.0
# run(what command..): fails with everything that was said.
function(run what)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  message("${output}")
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${what} failed (${result})")
  endif()
endfunction()

if(CHECK STREQUAL "size")
  execute_process(COMMAND ${STRIP} -o ${COPY} ${LIBRARY} COMMAND_ERROR_IS_FATAL ANY)
  file(SIZE ${COPY} bytes)
  message(STATUS "${LIBRARY}: ${bytes} bytes, stripped; at most ${MOST}")
  if(bytes GREATER MOST)
    message(FATAL_ERROR "the library is too large: ${bytes} bytes, stripped, but at most ${MOST}")
  endif()
elseif(CHECK STREQUAL "hardening")
  execute_process(COMMAND ${READELF} -W -d -l --dyn-syms ${LIBRARY} OUTPUT_VARIABLE text COMMAND_ERROR_IS_FATAL ANY)
  foreach(wanted "BIND_NOW|FLAGS_1.*NOW" "NODELETE" "GNU_RELRO"
          "GNU_STACK +0x[0-9a-f]+ 0x[0-9a-f]+ 0x[0-9a-f]+ 0x[0-9a-f]+ 0x[0-9a-f]+ RW " "__stack_chk_fail" "__[a-z]+_chk[@ ]")
    if(NOT text MATCHES "${wanted}")
      message(FATAL_ERROR "${LIBRARY}: readelf shows no ${wanted}")
    endif()
  endforeach()
elseif(CHECK STREQUAL "page")
  execute_process(COMMAND ${COMMAND} OUTPUT_VARIABLE made COMMAND_ERROR_IS_FATAL ANY)
  file(READ ${PAGE} kept)
  if(NOT made STREQUAL kept)
    message(FATAL_ERROR "${PAGE} is not what the program prints: run make docs")
  endif()
elseif(CHECK STREQUAL "consumer")
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
  foreach(file ${BIN}/ropewalk ${DATA}/ropewalk/models/models.json)
    if(NOT EXISTS ${prefix}/${file})
      message(FATAL_ERROR "cmake --install left out ${file}")
    endif()
  endforeach()
  run("the installed command line" ${CMAKE_COMMAND} -E chdir / ${prefix}/${BIN}/ropewalk doctor)

  # By pkg-config, the shared library and the static one.
  find_program(PKG_CONFIG pkg-config)
  if(PKG_CONFIG AND NOT SANITIZE)
    file(GLOB_RECURSE pc ${prefix}/*/ropewalk.pc)
    get_filename_component(pc ${pc} DIRECTORY)
    get_filename_component(libraries ${pc} DIRECTORY)
    foreach(kind shared static)
      set(option "")
      if(kind STREQUAL static)
        set(option --static)
      endif()
      execute_process(COMMAND ${CMAKE_COMMAND} -E env PKG_CONFIG_PATH=${pc} ${PKG_CONFIG} ${option} --cflags --libs ropewalk
        OUTPUT_VARIABLE flags OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
      separate_arguments(flags)
      if(kind STREQUAL static)
        list(TRANSFORM flags REPLACE "^-lropewalk$" -l:libropewalk.a)
      endif()
      run("building by pkg-config (${kind})" ${CXX} -std=c++20 ${SOURCE}/../../examples/rope.cc -o ${WORK}/by_pkg_config ${flags})
      run("running it" ${CMAKE_COMMAND} -E env LD_LIBRARY_PATH=${libraries} ${WORK}/by_pkg_config)
    endforeach()
  endif()

  # As a part of another project: only configured, since it would compile the same files again.
  file(WRITE ${WORK}/fetch/CMakeLists.txt "cmake_minimum_required(VERSION 3.25)
project(fetch LANGUAGES C CXX)
include(FetchContent)
FetchContent_Declare(ropewalk SOURCE_DIR ${SOURCE}/../..)
FetchContent_MakeAvailable(ropewalk)
add_executable(app ${SOURCE}/../../examples/rope.cc)
target_link_libraries(app PRIVATE ropewalk::ropewalk_static)
")
  run("configuring with FetchContent" ${CMAKE_COMMAND} -G ${GENERATOR} -DCMAKE_MAKE_PROGRAM=${MAKE} -S ${WORK}/fetch
    -B ${WORK}/fetch/build -DCMAKE_C_COMPILER=${C} -DCMAKE_CXX_COMPILER=${CXX})
else()
  message(FATAL_ERROR "no check '${CHECK}'")
endif()
