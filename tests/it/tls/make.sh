#!/bin/sh
# Makes the certificates of these tests, good for a hundred years: an authority, and a node on 127.0.0.1 that it vouches for.
set -eu
cd "$(dirname "$0")"
openssl ecparam -name prime256v1 -genkey -noout -out authority.key
openssl req -x509 -new -key authority.key -sha256 -days 36500 -subj '/CN=Mandoline tests' \
  -addext 'basicConstraints=critical,CA:TRUE' -addext 'keyUsage=critical,keyCertSign' -out authority.pem
openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out node.key
openssl req -new -key node.key -subj '/CN=node' -out node.csr
printf 'subjectAltName=IP:127.0.0.1,DNS:localhost\nbasicConstraints=CA:FALSE\n' > node.ext
openssl x509 -req -in node.csr -CA authority.pem -CAkey authority.key -CAcreateserial -sha256 -days 36500 \
  -extfile node.ext -out node.pem
# Nobody is to be vouched for later.
rm -f authority.key authority.srl node.csr node.ext
