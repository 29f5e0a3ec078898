# cmake --install: headers, libraries, the package files for find_package(ropewalk), the command line, the models.
# A wheel build installs only what cmake/python.cmake says.
# SPDX-License-Identifier: Apache-2.0

if(SKBUILD)
  return()
endif()
include(CMakePackageConfigHelpers)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/ropewalk)

install(DIRECTORY include/ropewalk TYPE INCLUDE FILES_MATCHING PATTERN "*.h" PATTERN "*.hpp")
install(TARGETS ropewalk ropewalk_static ropewalk_dlpack EXPORT ropewalkTargets)
install(EXPORT ropewalkTargets NAMESPACE ropewalk:: DESTINATION ${package_dir})
configure_package_config_file(cmake/ropewalkConfig.cmake.in ${PROJECT_BINARY_DIR}/ropewalkConfig.cmake
  INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/ropewalkConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/ropewalkConfig.cmake ${PROJECT_BINARY_DIR}/ropewalkConfigVersion.cmake
  DESTINATION ${package_dir})

if(ROPEWALK_CLI)
  install(TARGETS ropewalk_cli)
endif()
install(DIRECTORY models DESTINATION ${CMAKE_INSTALL_DATADIR}/ropewalk FILES_MATCHING PATTERN "*.json" PATTERN "*.md")
install(FILES LICENSE TYPE DOC)
