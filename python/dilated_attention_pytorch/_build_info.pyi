version: str  # of this package
torch_version: str  # 2.13.0
with_cuda: bool
cuda_version: str  # 13.0.88; empty without CUDA, as are the architectures
cuda_architectures: str
cuda_reason: str  # why there is no CUDA; empty with it
