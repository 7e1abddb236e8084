# docker build -t packlight . && docker run --rm -v "$PWD/build:/build:ro" packlight check /build/lite0
FROM python:3.11-slim
COPY . /src
RUN pip install --no-cache-dir /src && rm -rf /src && useradd --create-home packlight
USER packlight
WORKDIR /home/packlight
ENTRYPOINT ["packlight"]
