"""A decoder's pass on a CPU, in C that the machine's own compiler makes: vectors.h, products.h, attention.h, pass.c."""
