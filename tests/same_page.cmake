# Fails if the page PAGE of the docs is not what COMMAND (a list) prints now.
# SPDX-License-Identifier: Apache-2.0
execute_process(COMMAND ${COMMAND} OUTPUT_VARIABLE made COMMAND_ERROR_IS_FATAL ANY)
file(READ ${PAGE} kept)
if(NOT made STREQUAL kept)
  message(FATAL_ERROR "${PAGE} is not what the program prints: run make docs")
endif()
