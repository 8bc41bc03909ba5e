//! `mandoline proxy explain`: what would become of a request, stage by stage and why, by a proxy that runs or by a file alone.

use std::fmt::Write;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use mandoline_core::task::Address;
use mandoline_proxy::ask::Ask;
use mandoline_proxy::dry_run::{DryRun, Explanation};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::failure::{Failure, chain};
use crate::proxy::ProxyArgs;
use crate::proxy::kept::Kept;
use crate::proxy::settings::Settings;
use crate::show::Format;
use crate::text::Text;

/// How long a proxy is given to answer.
const WAIT: Duration = Duration::from_secs(10);

/// Says what would become of a request, stage by stage, and why
///
/// Nothing is sent. A proxy that runs says what it would do now: by its configuration, pauses, and what it knows of tasks. With
/// --config alone a file says as much as it can.
///
/// Examples:
///   mandoline proxy explain --url http://shop.example.com/carts/1 --header 'x-user: bob'
///   mandoline proxy explain --url http://shop.example.com/carts/1 --config proxy.yaml
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct ExplainArgs {
    /// What the request asks for
    #[arg(long)]
    url: String,
    /// Its method
    #[arg(long, default_value = "GET")]
    method: String,
    /// A header of it; repeat it for more
    #[arg(long = "header", value_name = "NAME: VALUE")]
    headers: Vec<String>,
    /// Where it comes from
    #[arg(long, value_name = "IP", default_value = "127.0.0.1")]
    client: IpAddr,
    /// Where a proxy has its admin address
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7480")]
    proxy: Text<Address>,
    /// A file to go by, in place of a proxy
    #[arg(long, value_name = "FILE", conflicts_with = "proxy")]
    config: Option<PathBuf>,
    /// How to print it
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

pub(crate) async fn run(args: ExplainArgs) -> Result<ExitCode, Failure> {
    let client = args.client.to_string();
    let mut parts = vec![("url", &*args.url), ("method", &*args.method), ("client", &*client)];
    parts.extend(args.headers.iter().map(|header| ("header", &**header)));
    let query = Ask::query(parts);
    let ask = Ask::of(&query).map_err(Failure::new)?;
    let explanation = match args.config {
        Some(file) => by_file(file, ask)?,
        None => by_proxy(&args.proxy.0, &query).await?,
    };
    args.output.print(&explanation, text(&explanation));
    Ok(ExitCode::SUCCESS)
}

fn by_file(file: PathBuf, ask: Ask) -> Result<Value, Failure> {
    let settings = Settings::of(ProxyArgs { config: Some(file), ..ProxyArgs::default() })?;
    let config = settings.config(&mut Kept::idle())?;
    let dry_run = DryRun::new(config).map_err(|error| settings.explain(&error))?;
    let Explanation(explanation) = dry_run.explain(ask.head, ask.client);
    Ok(explanation)
}

async fn by_proxy(proxy: &Address, query: &str) -> Result<Value, Failure> {
    let failed = |why: String| {
        Failure::new(format!("the proxy at {proxy} does not say"))
            .because(why)
            .try_this("give --proxy, where its /metrics are, or --config to go by a file alone")
    };
    let body = match timeout(WAIT, get(proxy, &format!("/explain?{query}"))).await {
        Ok(body) => body.map_err(failed)?,
        Err(_) => return Err(failed(format!("no answer within {WAIT:?}"))),
    };
    serde_json::from_slice(&body).map_err(|error| failed(error.to_string()))
}

async fn get(address: &Address, target: &str) -> Result<Bytes, String> {
    let broke = |error: hyper::Error| chain(&error);
    let stream = TcpStream::connect(address.as_str()).await.map_err(|error| error.to_string())?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broke)?;
    let request = http::Request::get(target)
        .header("host", address.as_str())
        .header("connection", "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    let asked = async {
        let answer = sender.send_request(request).await.map_err(broke)?;
        let status = answer.status();
        let body = answer.into_body().collect().await.map_err(broke)?.to_bytes();
        if status.is_success() {
            return Ok(body);
        }
        Err(format!("it answers {status}: {}", String::from_utf8_lossy(&body).trim_end()))
    };
    let (answer, _) = tokio::join!(asked, connection);
    answer
}

/// A line for each sentence, with the stage before the first of its own.
fn text(explanation: &Value) -> String {
    let mut all = String::new();
    for stage in explanation["stages"].as_array().into_iter().flatten() {
        let mut name = stage["stage"].as_str().unwrap_or_default();
        for says in stage["says"].as_array().into_iter().flatten() {
            let says = says.as_str().unwrap_or_default();
            writeln!(all, "{name:<9} {says}").expect("a string takes it");
            name = "";
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explain(yaml: &str, url: &str, headers: &[&str]) -> (Value, String) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("proxy.yaml");
        std::fs::write(&path, yaml).unwrap();
        std::fs::write(folder.path().join("secret"), "open sesame\n").unwrap();
        let parts = headers.iter().map(|header| ("header", *header)).chain([("url", url)]);
        let explanation = by_file(path, Ask::of(&Ask::query(parts)).unwrap()).unwrap();
        let text = text(&explanation);
        (explanation, text)
    }

    #[tokio::test]
    async fn a_file_explains_as_far_as_it_can() {
        let yaml = "id: p1
routes:
  - {name: carts, host: shop.example.com, path: /carts/*, job: carts, key: 'header:x-user'}
  - {name: canary, host: shop.example.com, path: /carts/*, headers: {x-canary: 'yes'}, job: next, key: 'header:x-user'}
  - {name: writes, host: shop.example.com, path: /carts/*, methods: [PUT], job: carts, key: 'header:x-user'}
  - {name: others, job: kv}
  - {name: elsewhere, host: b.org, path: /b, job: kv}
  - {name: inside, host: b.org, path: /in, job: kv, key: json(/id)}
pauses: {exempt_header: {name: x-open, secret_file: secret}}
access_log: {to: stdout, share: 1%}
debug: {networks: ['10.0.0.0/8']}
";
        let url = "http://shop.example.com/carts/1";
        let (value, said) = explain(yaml, url, &["x-user: bob"]);
        let expected = "\
identify  it is for the host shop.example.com, and can be passed on
admit     the route \"carts\" takes it
          not \"writes\": it takes PUT
          not \"canary\": it asks for a certain value of the header x-canary
          not \"others\": it would take it, but is less specific
          its body may have 104857600 bytes
key       the key is the value of the header x-user
          it lies at KEY
pause     whether a pause holds it only a proxy that runs knows
route     no assignment of the job carts has come in yet
          who owns the key only a proxy that runs knows: ask it with --proxy
observe   the access log tells of 1% of such requests, and of any that fails
          from 127.0.0.1, the header mandoline-explain asks in vain
";
        let key = mandoline_core::key::SliceKey::of(b"bob").to_string();
        assert_eq!(said, expected.replace("KEY", &key));
        assert_eq!(value["stages"][2]["key"], key);
        assert_eq!(value["end"], Value::Null);

        let (value, said) = explain(yaml, "http://b.org/in", &[]);
        let expected = "the key is the field /id of the JSON body\n          that is in the body, of which nothing is known here\n";
        assert!(said.contains(expected), "{said}");
        assert_eq!(value["end"], Value::Null);

        let (value, said) = explain(yaml, url, &[]);
        assert!(said.contains("answers 400: the request has no key"), "{said}");
        assert_eq!(value["end"]["answers"]["status"], 400);
        let (value, said) = explain(yaml, "http://shop.example.com/carts/../1", &[]);
        assert!(said.contains("admit     answers 400: the path has . or .."), "{said}");
        assert_eq!(value["stages"].as_array().unwrap().len(), 3);
    }
}
