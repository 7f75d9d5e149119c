# RubiksNet with CUDA. Build: docker build -t rubiks .
# Run: docker run --gpus all --ipc=host -v /data:/data -v "$PWD/outputs:/home/rubiks/app/outputs" rubiks \
#          python train.py tier=large data=ssv2 data.root=/data/ssv2
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ make python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home rubiks
USER rubiks
WORKDIR /home/rubiks/app

# Packages and the compiled operator first: they change less often than the code. No GPU need be there while building;
# it is compiled for TORCH_CUDA_ARCH_LIST, by default 8.0, 9.0 and, through PTX, later ones.
ARG TORCH_CUDA_ARCH_LIST=
COPY --chown=rubiks Makefile pyproject.toml setup.py README.md LICENSE ./
COPY --chown=rubiks ext ext
RUN mkdir rubiks && touch rubiks/__init__.py && make setup PYTHON=python3
COPY --chown=rubiks . .

ENV PATH=/home/rubiks/app/.venv/bin:$PATH
CMD ["make", "train"]
