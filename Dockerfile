# docker build -t wikiart .
# mkdir -p runs    # yours, so that results are
# docker run --user $(id -u) --gpus all -v /scratch/wikiart:/paintings -v $PWD/runs:/wikiart/runs \
#     wikiart make WIKIART=/paintings
# docker run --user $(id -u) -p 127.0.0.1:7860:7860 -v /scratch/wikiart:/paintings -v $PWD/runs:/wikiart/runs \
#     wikiart make serve WIKIART=/paintings HOST=0.0.0.0
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /wikiart
COPY requirements.txt Makefile ./
COPY requirements requirements
COPY report/report.mk report/
RUN make .venv/ready-label
COPY . .
RUN touch .venv/ready && touch .venv/ready-label && mkdir -p data runs && chmod 1777 data runs
USER 1000
ENV HOME=/tmp
EXPOSE 7860
CMD ["make"]
