#!/usr/bin/env bash
# A C++ compiler for Horovod's build: it asks for C++11 and C++14, torch's headers for C++17.
exec c++ "${@/#-std=*/-std=gnu++17}"
