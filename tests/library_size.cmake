# Fails if the library, stripped, has more than MOST bytes.
# SPDX-License-Identifier: Apache-2.0
execute_process(COMMAND ${STRIP} -o ${COPY} ${LIBRARY} COMMAND_ERROR_IS_FATAL ANY)
file(SIZE ${COPY} bytes)
message(STATUS "${LIBRARY}: ${bytes} bytes, stripped; at most ${MOST}")
if(bytes GREATER MOST)
  message(FATAL_ERROR "the library is too large: ${bytes} bytes, stripped, but at most ${MOST}")
endif()
