"""`python -m dilated_attention_pytorch`: what is installed, and where a C++ program finds it."""

from __future__ import annotations

import argparse

import torch

from ._load import build_info, cmake_prefix_path, include_path, library_path


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description=__doc__)
    parser.add_argument(
        "--cmake-prefix-path",
        action="store_true",
        help="print the CMAKE_PREFIX_PATH for find_package(dilated CONFIG) and find_package(Torch)",
    )
    if parser.parse_args().cmake_prefix_path:
        print(f"{cmake_prefix_path};{torch.utils.cmake_prefix_path}")
        return
    cuda = build_info.cuda_reason
    if build_info.with_cuda:
        cuda = f"{build_info.cuda_version}, architectures {build_info.cuda_architectures}"
    print(f"library  {library_path}")
    print(f"headers  {include_path}")
    print(f"torch    {build_info.torch_version} at build time, {torch.__version__} now")
    print(f"CUDA     {cuda}")


if __name__ == "__main__":
    main()
