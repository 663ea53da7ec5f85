# docker build -t wikiart .
# docker run --gpus all -v /scratch/wikiart:/paintings -v $PWD/runs:/wikiart/runs wikiart make WIKIART=/paintings
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /wikiart
COPY requirements.txt Makefile ./
RUN make .venv/ready
COPY . .
RUN touch .venv/ready
CMD ["make"]
