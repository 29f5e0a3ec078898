# The Python module: one shared library with the core inside, which needs libtvm_ffi.so (loaded by `import tvm_ffi`)
# and nothing of Python's, so that one wheel serves every Python.
# SPDX-License-Identifier: Apache-2.0

ropewalk_find_tvm_ffi()

add_library(ropewalk_python MODULE bindings/python/module.cc)
set_target_properties(ropewalk_python PROPERTIES OUTPUT_NAME _ropewalk PREFIX ""
  LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/python/ropewalk)
target_include_directories(ropewalk_python SYSTEM PRIVATE ${tvm_ffi_includes})
target_link_libraries(ropewalk_python PRIVATE $<LINK_LIBRARY:WHOLE_ARCHIVE,ropewalk_static> ropewalk_flags tvm_ffi::shared)
target_include_directories(ropewalk_python PRIVATE ${PROJECT_SOURCE_DIR})
ropewalk_export_only(ropewalk_python "ropewalk_*" "__tvm_ffi_*")
# `import tvm_ffi` has loaded libtvm_ffi.so by the time the module is opened; the path serves other users of it.
set_target_properties(ropewalk_python PROPERTIES
  BUILD_WITH_INSTALL_RPATH TRUE INSTALL_RPATH "$ORIGIN/../tvm_ffi/lib")

if(NOT SKBUILD)
  # The package as it would be installed, for tests of this very build: PYTHONPATH=BUILD/python.
  file(MAKE_DIRECTORY ${PROJECT_BINARY_DIR}/python/ropewalk)
  file(GLOB python_files CONFIGURE_DEPENDS bindings/python/ropewalk/*)
  foreach(file IN LISTS python_files)
    get_filename_component(name ${file} NAME)
    file(CREATE_LINK ${file} ${PROJECT_BINARY_DIR}/python/ropewalk/${name} SYMBOLIC)
  endforeach()
else()
  install(TARGETS ropewalk_python LIBRARY DESTINATION ropewalk)
  install(TARGETS ropewalk_cli RUNTIME DESTINATION ${SKBUILD_SCRIPTS_DIR})
  # bin/ropewalk finds them at ../share/ropewalk/models, in a wheel as after cmake --install.
  install(DIRECTORY models DESTINATION ${SKBUILD_DATA_DIR}/share/ropewalk FILES_MATCHING PATTERN "*.json")
endif()
