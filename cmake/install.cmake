# cmake --install: headers, libraries, the package files for find_package(ropewalk) and pkg-config, the command line, the
# models. In a wheel the same lies below ropewalk/, the Python package, without the static library and the command.
# SPDX-License-Identifier: Apache-2.0

include(CMakePackageConfigHelpers)
if(SKBUILD AND NOT PROJECT_IS_TOP_LEVEL)
  return()  # the wheel is of another project
endif()
if(SKBUILD)
  set(ropewalk_root ropewalk/)  # of everything, from where the wheel is unpacked
  set(ropewalk_include_dir include)
  set(ropewalk_library_dir lib)
  set(ropewalk_installed ropewalk)
else()
  set(ropewalk_root "")
  set(ropewalk_include_dir ${CMAKE_INSTALL_INCLUDEDIR})
  set(ropewalk_library_dir ${CMAKE_INSTALL_LIBDIR})
  set(ropewalk_installed ropewalk ropewalk_static)
endif()
set(headers_dir ${ropewalk_root}${ropewalk_include_dir})
set(library_dir ${ropewalk_root}${ropewalk_library_dir})
set(package_dir ${library_dir}/cmake/ropewalk)

install(DIRECTORY include/ropewalk DESTINATION ${headers_dir} FILES_MATCHING PATTERN "*.h" PATTERN "*.hpp")
install(TARGETS ${ropewalk_installed} ropewalk_dlpack EXPORT ropewalkTargets LIBRARY DESTINATION ${library_dir}
  ARCHIVE DESTINATION ${library_dir} INCLUDES DESTINATION ${headers_dir})
install(EXPORT ropewalkTargets NAMESPACE ropewalk:: DESTINATION ${package_dir})
configure_package_config_file(cmake/ropewalkConfig.cmake.in ${PROJECT_BINARY_DIR}/ropewalkConfig.cmake
  INSTALL_DESTINATION ${package_dir} PATH_VARS headers_dir)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/ropewalkConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/ropewalkConfig.cmake ${PROJECT_BINARY_DIR}/ropewalkConfigVersion.cmake
  DESTINATION ${package_dir})

# Where the folders are given from the root, so is the prefix.
set(ropewalk_pc_prefix ${CMAKE_INSTALL_PREFIX})
if(NOT IS_ABSOLUTE "${ropewalk_library_dir}")
  file(RELATIVE_PATH up /${library_dir}/pkgconfig /${ropewalk_root}.)
  string(REGEX REPLACE "/$" "" up "${up}")
  set(ropewalk_pc_prefix "\${pcfiledir}/${up}")
endif()
set(ropewalk_pc_include "\${prefix}")
cmake_path(APPEND ropewalk_pc_include "${ropewalk_include_dir}")
set(ropewalk_pc_library "\${prefix}")
cmake_path(APPEND ropewalk_pc_library "${ropewalk_library_dir}")
set(ropewalk_private_libraries "")
if(NOT SKBUILD)  # of the static library, which a wheel has not
  set(ropewalk_private_libraries "-Wl,-z,nodelete -lstdc++ -lm -lpthread -ldl")
  if(ROPEWALK_WITH_ZLIB)
    string(PREPEND ropewalk_private_libraries "-lz ")
  endif()
endif()
configure_file(cmake/ropewalk.pc.in ${PROJECT_BINARY_DIR}/ropewalk.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/ropewalk.pc DESTINATION ${library_dir}/pkgconfig)

if(SKBUILD)
  # ropewalk.h includes it, and whoever installs a wheel may not have it.
  install(FILES ${ropewalk_dlpack_INCLUDE_DIR}/dlpack/dlpack.h DESTINATION ${headers_dir}/dlpack)
  return()
endif()
if(ROPEWALK_CLI)
  install(TARGETS ropewalk_cli)
endif()
install(DIRECTORY models DESTINATION ${CMAKE_INSTALL_DATADIR}/ropewalk FILES_MATCHING PATTERN "*.json")
install(FILES LICENSE THIRD_PARTY_LICENSES TYPE DOC)
