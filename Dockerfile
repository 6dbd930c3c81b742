# docker build --target cpu --tag face-vae:cpu .
# docker build --target gpu --tag face-vae:gpu .
# docker run --gpus all --ipc host --volume "$PWD/data:/data" face-vae:gpu --config /app/configs/ultra.json
#
# Runs, models and downloads go to /data. Torch's wheels contain the CUDA libraries, so the host needs the driver and the
# NVIDIA container toolkit only.
FROM python:3.12-slim AS base
# g++: torch.compile and Triton
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HF_HOME=/data/huggingface TORCH_HOME=/data/torch
VOLUME /data
WORKDIR /data

FROM base AS cpu
RUN pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu
COPY . /app
RUN pip install --editable '/app[quickstart]'
ENTRYPOINT ["python", "/app/train_vae.py"]
CMD ["--config", "/app/configs/quickstart.json"]

FROM base AS gpu
RUN pip install torch torchvision
COPY . /app
RUN pip install --editable /app
ENTRYPOINT ["torchrun", "--standalone", "--nproc_per_node", "gpu", "/app/train_vae.py"]
CMD ["--config", "/app/configs/ultra.json"]
