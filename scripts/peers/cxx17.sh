#!/usr/bin/env bash
# A C++ compiler for Horovod's build: its CMake asks for C++14, torch's headers for C++17.
exec c++ "${@/-std=gnu++14/-std=gnu++17}"
