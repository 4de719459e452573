// Which Python a compiled library fits. A number that grows whenever a schema of mf_kernels/ops, the functions of a
// library or what the engine takes changes: mf_kernels/_native.py and mobileformer/inference/library.py look for it
// before they trust a file that bears the library's name.
#pragma once

#define MF_INTERFACE 1
#define MF_INTERFACE_TEXT_OF(number) #number
#define MF_INTERFACE_TEXT(number) MF_INTERFACE_TEXT_OF(number)
