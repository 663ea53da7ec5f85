# docker build -t wikiart .
# docker run --gpus all -v /scratch/wikiart:/paintings -v $PWD/runs:/wikiart/runs wikiart make WIKIART=/paintings
# docker run -p 127.0.0.1:7860:7860 -v /scratch/wikiart:/paintings -v $PWD/runs:/wikiart/runs \
#     wikiart make serve WIKIART=/paintings HOST=0.0.0.0
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /wikiart
COPY requirements.txt requirements-label.txt Makefile ./
RUN make .venv/ready-label
COPY . .
RUN touch .venv/ready && touch .venv/ready-label
EXPOSE 7860
CMD ["make"]
