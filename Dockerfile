# Loopwright in a container, set up by the same make as everywhere:
#   docker build -t loopwright . && docker run --rm -it loopwright
FROM python:3.12-slim
# the compiler is for torch.compile
RUN apt-get update && apt-get install -y --no-install-recommends g++ make && rm -rf /var/lib/apt/lists/*
WORKDIR /loopwright
COPY . .
# builds of torch for the CPU; for a GPU: --build-arg PIP_EXTRA_INDEX_URL= and docker run --gpus all
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN PIP_NO_CACHE_DIR=1 make .venv/.installed
ENV PATH=/loopwright/.venv/bin:$PATH
CMD ["make", "demo"]
