# Programs over the targets of the package, wherever these come from.
foreach(kind p2p p2p_static)
    foreach(language c cpp)
        add_executable(${language}_${kind} ${CMAKE_CURRENT_LIST_DIR}/consumer.${language})
        target_link_libraries(${language}_${kind} PRIVATE uccl::${kind})
        target_compile_options(${language}_${kind} PRIVATE -Wall -Wextra -Werror)
        set_target_properties(${language}_${kind} PROPERTIES
            C_STANDARD 11 C_STANDARD_REQUIRED ON C_EXTENSIONS OFF CXX_STANDARD 17 CXX_STANDARD_REQUIRED ON CXX_EXTENSIONS OFF)
    endforeach()
endforeach()
