# Checks of what was built, as a script: cmake -DCHECK=NAME .. -P checks.cmake.
#   size        the LIBRARY, stripped by STRIP into COPY, has at most MOST bytes
#   hardening   the LIBRARY cannot have its jump tables or its stack rewritten, nor be unloaded while threads are in it
#   page        the page PAGE of the docs is what COMMAND (a list) prints now
# SPDX-License-Identifier: Apache-2.0
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
else()
  message(FATAL_ERROR "no check '${CHECK}'")
endif()
