# Fails if the library can have its jump tables or its stack rewritten, or is unloaded while threads are in it.
# SPDX-License-Identifier: Apache-2.0
execute_process(COMMAND ${READELF} -W -d -l --dyn-syms ${LIBRARY} OUTPUT_VARIABLE text COMMAND_ERROR_IS_FATAL ANY)
foreach(wanted "BIND_NOW|FLAGS_1.*NOW" "NODELETE" "GNU_RELRO" "GNU_STACK +0x[0-9a-f]+ 0x[0-9a-f]+ 0x[0-9a-f]+ 0x[0-9a-f]+ 0x[0-9a-f]+ RW "
        "__stack_chk_fail" "__[a-z]+_chk[@ ]")
  if(NOT text MATCHES "${wanted}")
    message(FATAL_ERROR "${LIBRARY}: readelf shows no ${wanted}")
  endif()
endforeach()
