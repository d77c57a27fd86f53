// tests/cli/paper/wheel_only.cpp: a library in the place of those that Python's wheels have.
extern "C" int partita_wheel_only() { return 1; }
