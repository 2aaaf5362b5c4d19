# What is installed, and the package files: all find their files relative to themselves, so a prefix may be moved as a whole.
include(CMakePackageConfigHelpers)

# Stripped copies are made when the installation starts; the files of the build tree keep their symbols.
set(from_lib "${lib}")
set(from_bin "${bin}")
if(UCCL_P2P_STRIP AND CMAKE_STRIP)
    set(from_lib "${CMAKE_CURRENT_BINARY_DIR}/stripped/lib")
    set(from_bin "${CMAKE_CURRENT_BINARY_DIR}/stripped/bin")
    set(programs "")
    foreach(tool IN LISTS tools)
        string(APPEND programs " \"bin/${tool}\"")
    endforeach()
    configure_file("${CMAKE_CURRENT_LIST_DIR}/strip.cmake.in" "${CMAKE_CURRENT_BINARY_DIR}/strip.cmake" @ONLY)
    install(SCRIPT "${CMAKE_CURRENT_BINARY_DIR}/strip.cmake")
endif()

install(FILES "${from_lib}/${shared_file}" "${lib}/${soname}" "${lib}/libuccl_p2p.so" "${from_lib}/libuccl_p2p.a" DESTINATION "${CMAKE_INSTALL_LIBDIR}")
install(FILES "${from_lib}/uccl/${soft_plugin_file}" DESTINATION "${CMAKE_INSTALL_LIBDIR}/uccl")
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
    FILES_MATCHING PATTERN "*.h" PATTERN "*.hpp")
foreach(tool IN LISTS tools)
    install(PROGRAMS "${from_bin}/${tool}" DESTINATION "${CMAKE_INSTALL_BINDIR}")
    install(FILES "${PROJECT_SOURCE_DIR}/docs/man/${tool}.1" DESTINATION "${CMAKE_INSTALL_MANDIR}/man1")
endforeach()

install(DIRECTORY "${PROJECT_SOURCE_DIR}/docs/man/" DESTINATION "${CMAKE_INSTALL_MANDIR}/man3" FILES_MATCHING PATTERN "*.3")
install(FILES "${PROJECT_SOURCE_DIR}/docs/man/uccl_p2p.7" DESTINATION "${CMAKE_INSTALL_MANDIR}/man7")

# The folders as they are in the repository: links between installed pages work. Those to files of the repository alone
# (CONTRIBUTING.md, SECURITY.md, packaging, tests) need a checkout.
foreach(file LICENSE THIRD-PARTY-NOTICES.txt README.md CHANGELOG.md)
    install(FILES "${PROJECT_SOURCE_DIR}/${file}" DESTINATION "${CMAKE_INSTALL_DOCDIR}")
endforeach()
install(FILES "${PROJECT_SOURCE_DIR}/nixl/README.md" DESTINATION "${CMAKE_INSTALL_DOCDIR}/nixl")
install(FILES "${PROJECT_SOURCE_DIR}/cmake/README.md" DESTINATION "${CMAKE_INSTALL_DOCDIR}/cmake")
install(DIRECTORY "${PROJECT_SOURCE_DIR}/docs" DESTINATION "${CMAKE_INSTALL_DOCDIR}"
    FILES_MATCHING PATTERN "*.md" PATTERN "*.svg" PATTERN "man" EXCLUDE PATTERN "newcomer.d" EXCLUDE)
install(DIRECTORY "${PROJECT_SOURCE_DIR}/examples" DESTINATION "${CMAKE_INSTALL_DOCDIR}"
    FILES_MATCHING PATTERN "*.c" PATTERN "*.cpp" PATTERN "*.py")
install(DIRECTORY "${PROJECT_SOURCE_DIR}/deploy" DESTINATION "${CMAKE_INSTALL_DOCDIR}")

set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/uccl_p2p")
configure_package_config_file("${CMAKE_CURRENT_LIST_DIR}/uccl_p2pConfig.cmake.in" "${CMAKE_CURRENT_BINARY_DIR}/uccl_p2pConfig.cmake"
    INSTALL_DESTINATION "${package_dir}"
    PATH_VARS CMAKE_INSTALL_LIBDIR CMAKE_INSTALL_INCLUDEDIR
    NO_CHECK_REQUIRED_COMPONENTS_MACRO)
# One SONAME, one compatible series: while the major version is 0, a minor release may change it (docs/compatibility.md).
write_basic_package_version_file("${CMAKE_CURRENT_BINARY_DIR}/uccl_p2pConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/uccl_p2pConfig.cmake" "${CMAKE_CURRENT_BINARY_DIR}/uccl_p2pConfigVersion.cmake"
    DESTINATION "${package_dir}")

# pkg-config finds the prefix from the place of the .pc file, unless a folder is set to a place outside the prefix.
if(IS_ABSOLUTE "${CMAKE_INSTALL_LIBDIR}" OR IS_ABSOLUTE "${CMAKE_INSTALL_INCLUDEDIR}")
    set(pc_prefix "${CMAKE_INSTALL_PREFIX}")
    set(pc_libdir "${CMAKE_INSTALL_FULL_LIBDIR}")
    set(pc_includedir "${CMAKE_INSTALL_FULL_INCLUDEDIR}")
else()
    file(RELATIVE_PATH up "/p/${CMAKE_INSTALL_LIBDIR}/pkgconfig" "/p")
    string(REGEX REPLACE "/$" "" up "${up}")
    set(pc_prefix "\${pcfiledir}/${up}")
    set(pc_libdir "\${prefix}/${CMAKE_INSTALL_LIBDIR}")
    set(pc_includedir "\${prefix}/${CMAKE_INSTALL_INCLUDEDIR}")
endif()
list(TRANSFORM UCCL_P2P_SYSTEM_LIBS PREPEND "-l" OUTPUT_VARIABLE pc_system_libs)
list(JOIN pc_system_libs " " pc_system_libs)
configure_file("${CMAKE_CURRENT_LIST_DIR}/uccl_p2p.pc.in" "${CMAKE_CURRENT_BINARY_DIR}/uccl_p2p.pc" @ONLY)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/uccl_p2p.pc" DESTINATION "${CMAKE_INSTALL_LIBDIR}/pkgconfig")
