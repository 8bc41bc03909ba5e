//! The JSON Schema of the proxy's file: what editors and other programs need to know of the form.
//!
//! It and the parser say the same, tested: each example that one takes, the other takes, and the fields are the same ones. The
//! documentation's examples are examples, too.

/// The schema, as `mandoline proxy schema` prints it.
pub(crate) const SCHEMA: &str = include_str!("../../proxy.schema.json");

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::SCHEMA;
    use crate::file;
    use crate::proxy::ProxyArgs;
    use crate::proxy::kept::Kept;
    use crate::proxy::settings::Settings;
    use crate::schema::fits;

    fn schema() -> Value {
        serde_json::from_str(SCHEMA).unwrap()
    }

    /// Says why a file cannot work, if it cannot.
    async fn fault(yaml: &str) -> Option<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("proxy.yaml");
        std::fs::write(&path, yaml).unwrap();
        let checked =
            Settings::of(ProxyArgs { config: Some(path.clone()), ..ProxyArgs::default() })
                .and_then(|settings| {
                    let config = settings.config(&mut Kept::idle())?;
                    settings.check(config).map(drop)
                });
        checked
            .err()
            .map(|failure| failure.to_string().replace(&path.display().to_string(), "proxy.yaml"))
    }

    /// Says whether both take a file; they must agree.
    async fn taken(yaml: &str) -> bool {
        let value: Value = file::parse(yaml, "-").unwrap();
        let by_schema = fits(&schema(), &schema(), &value);
        let by_parser = fault(yaml).await;
        assert_eq!(by_schema, by_parser.is_none(), "{yaml}\n{by_parser:?}");
        by_schema
    }

    #[tokio::test]
    async fn the_schema_and_the_parser_take_the_same() {
        for good in [
            "{}",
            "{listen: '127.0.0.1:8080', admin: '[::1]:7480', id: edge-1}",
            "{job: carts, key: header:x-user, cache: /tmp/carts}",
            "{assigners: ['a:7400', 'b:7400'], watch_peers: ['c:7400'], zone: a}",
            "{region: eu, gateways: ['us=gw:80']}",
            "{max_staleness: 1m, workers: 2, hold_wait: 5s, hold_requests: 10, hold_bytes: 1MiB}",
            "{limits: {replay_bytes: 0}}",
            "{limits: {replay_bytes: '0'}}",
            "{timeouts: {connect: 500ms, response: 1m}, limits: {connections: 100, header_bytes: 16KiB}}",
            "{pauses: {wait: 1m, requests: 10, bytes: 1MiB, exempt_paths: [/healthz], cache: /tmp/flags}}",
            "{routes: [{job: kv}]}",
            "{listeners: [{address: '0.0.0.0:8080'}, {address: 'unix:/run/p.sock', mode: '0600', http2: false}]}",
            "{listeners: [{address: '[::]:8443', tls: {certificates: [{chain: a.pem, key: a.key}]}, http2_streams: 10}]}",
            "{listeners: [{address: '[::]:8443', proxy_protocol: ['10.0.0.0/8', '::1'], tls: {certificates: [{chain: a.pem, key: a.key}], clients: {authorities: ca.pem, required: false}}}]}",
            "{routes: [{host: a.org, path: /x/*, methods: [GET], headers: {x-a: b}, job: kv, key: host}]}",
            "{jobs: {kv: {protocol: http2}}}",
            "{routes: [{pool: web}], pools: {web: {servers: ['a:80', 'b:80'], protocol: http2}}}",
            "{pools: {web: {servers: ['a:80'], health: {check: /livez, every: 1s, within: 500ms, good: 2, bad: 1}}}}",
            "{routes: [{job: kv, protocol: http1, response_timeout: 5s, total_timeout: 1m}]}",
            "{routes: [{job: kv, upgrades: [websocket, x-tunnel/2, h2cx]}], timeouts: {tunnel: 1h}}",
            "{routes: [{job: kv, upgrades: []}]}",
            "{routes: [{job: kv, body_bytes: 1GiB}], limits: {body_bytes: 1MiB, tunnels: 5}}",
            "{routes: [{job: kv}, {host: '*.a.org', job: carts}], jobs: {carts: {cache: /tmp/carts}}}",
            "{access: {insecure: true}}",
            "{routes: [{job: kv, request: {set: {x-id: '{request_id}'}, remove: [cookie]}, response: {}}]}",
            "{access_log: {to: stdout}}",
            "{access_log: {to: ./access.log, format: '{client} {header:user-agent}', share: 1%, slow: 1s}}",
            "{access_log: {to: stderr, format: json, fields: [time, 'header:x-a', status]}}",
            "{debug: {networks: ['10.0.0.0/8', '::1']}}",
            "{forwarded: {}}",
            "{forwarded: {trusted: ['10.0.0.0/8'], headers: [Forwarded], x_forwarded: false}}",
            "{forwarded: {headers: [x-forwarded-for, x-real-ip, X-Forwarded-Prefix]}}",
            "{debug: {networks: [], header: x-explain}}",
            "{traces: {otlp: 'http://127.0.0.1:4317', share: 0.5%}}",
            "{lookups: {shops: {sqlite: {file: shops.db, query: select 1}, ttl: 0s, negative_ttl: 1s, stale: 1h, timeout: 200ms, cache_bytes: 1MiB}}, routes: [{job: kv, key: host, lookup: shops}]}",
            "{lookups: {shops.1: {postgres: {address: 'db:5432', user: proxy, database: shops, query: 'select shard from shops where domain = $1', listen: shops}}}}",
            "{lookups: {s: {postgres: {address: 'unix:/run/postgresql/.s.PGSQL.5432', user: proxy, database: shops, query: select 1}}}}",
            "{lookups: {s: {http: {url: 'http://127.0.0.1:9000/shards?of={key}', field: /shop/shard}}}}",
        ] {
            assert!(taken(good).await, "{good}");
        }
        for bad in [
            "{lsten: '127.0.0.1:8080'}",
            "{listen: here}",
            "{job: a b}",
            "{workers: 0}",
            "{hold_wait: 5}",
            "{hold_bytes: 64}",
            "{routes: []}",
            "{listeners: []}",
            "{listeners: [{address: here}]}",
            "{listeners: [{address: 'unix:p.sock'}]}",
            "{listeners: [{address: 'unix:/p.sock', mode: '0888'}]}",
            "{listeners: [{adress: '0.0.0.0:8080'}]}",
            "{listeners: [{address: '0.0.0.0:8080', http2_streams: 0}]}",
            "{listeners: [{address: '0.0.0.0:8080', proxy_protocol: [here]}]}",
            "{listeners: [{address: '0.0.0.0:8080', tls: {certificates: []}}]}",
            "{listeners: [{address: '0.0.0.0:8080', tls: {certificates: [{chain: a.pem}]}}]}",
            "{routes: [{hots: a.org, job: kv}]}",
            "{routes: [{path: carts, job: kv}]}",
            "{routes: [{host: '', job: kv}]}",
            "{routes: [{job: kv, upgrades: [H2C]}]}",
            "{routes: [{job: kv, upgrades: [http/2]}]}",
            "{routes: [{job: kv, upgrades: [web socket]}]}",
            "{timeouts: {conect: 1s}}",
            "{limits: {headers: many}}",
            "{routes: [{job: kv, body_bytes: none}]}",
            "{pauses: {wait: soon}}",
            "{pauses: {exempt_header: {name: x-pass}}}",
            "{jobs: {kv: {cash: /tmp/kv}}}",
            "{pools: {web: {}}}",
            "{pools: {web: {servers: []}}}",
            "{pools: {web: {servers: [here]}}}",
            "{pools: {web: {servers: ['a:80', 'a:80']}}}",
            "{pools: {web: {servers: ['a:80'], health: {}}}}",
            "{pools: {web: {servers: ['a:80'], health: {check: livez}}}}",
            "{pools: {web: {servers: ['a:80'], health: {check: tcp, bad: 0}}}}",
            "{access: {tls_crt: a}}",
            "{routes: [{job: kv, request: {ste: {}}}]}",
            "{access_log: {}}",
            "{access_log: {to: access.log}}",
            "{access_log: {to: stdout, fields: [staus]}}",
            "{access_log: {to: stdout, fields: []}}",
            "{access_log: {to: stdout, share: 0.5}}",
            "{debug: {networks: [here]}}",
            "{forwarded: {trusted: [here]}}",
            "{forwarded: {headers: [x_forwarded_for]}}",
            "{forwarded: {headers: [via]}}",
            "{forwarded: {x_forwarded: sometimes}}",
            "{debug: {header: x-explain}}",
            "{lookups: {shops: {}}}",
            "{lookups: {shops: {ttl: 1s}}}",
            "{lookups: {a b: {sqlite: {file: a, query: b}}}}",
            "{lookups: {s: {sqlite: {file: a, query: b}, http: {url: 'http://a/{key}'}}}}",
            "{lookups: {s: {sqlite: {file: a}}}}",
            "{lookups: {s: {postgres: {address: db, user: a, database: b, query: c}}}}",
            "{lookups: {s: {postgres: {address: 'db:1', user: '', database: b, query: c}}}}",
            "{lookups: {s: {http: {url: 'http://a/'}}}}",
            "{lookups: {s: {http: {url: 'http://a/{key}', field: shard}}}}",
            "{traces: {share: 1%}}",
            "{traces: {otlp: '127.0.0.1:4317'}}",
        ] {
            assert!(!taken(bad).await, "{bad}");
        }
    }

    #[tokio::test]
    async fn what_is_wrong_has_a_place_and_says_what_was_meant() {
        for (yaml, expected) in [
            (
                "listen: 127.0.0.1:80\nruotes:\n  - {job: kv}\n",
                "proxy.yaml:2:1: unknown field \"ruotes\"",
            ),
            ("routes:\n  - job: kv\n    keey: host\n", "proxy.yaml:3:5: unknown field \"keey\""),
            (
                "routes:\n  - job: kv\n    path: carts\n",
                "proxy.yaml:3:11: path: \"carts\" is no path",
            ),
            ("routes:\n  - host: a.org\n", "proxy.yaml:2:5: this route leads nowhere"),
            (
                "routes:\n  - {pool: web, job: kv}\n",
                "proxy.yaml:2:5: this route leads to a job and to a pool",
            ),
            (
                "routes:\n  - {pool: web, key: host}\n",
                "proxy.yaml:2:5: this route has a key and leads to a pool",
            ),
            ("routes:\n  - pool: web\n", "proxy.yaml:2:5: there is no pool web"),
            (
                "routes:\n  - {job: web}\npools:\n  web: {servers: ['a:80']}\n",
                "proxy.yaml:4:8: there are a job and a pool called web",
            ),
            (
                "pools:\n  web: {servers: ['a:80', 'a:80']}\n",
                "proxy.yaml:2:8: pool web has the server a:80 twice",
            ),
            (
                "pools:\n  web:\n    servers: ['a:80']\n    health: {check: tcp, every: 0s}\n",
                "proxy.yaml:3:5: the health checks of pool web: every and within",
            ),
            (
                "routes:\n  - {host: a.org, job: kv}\n  - {job: kv}\n  - {host: A.org, job: carts}\n",
                "proxy.yaml:4:5: routes 1 and 3 both take a.org/*, and neither is more specific",
            ),
            (
                "routes:\n  - {name: a, job: kv}\n  - {name: a, path: /b, job: kv}\n",
                "proxy.yaml:3:5: two routes are called",
            ),
            (
                "routes:\n  - job: kv\n    request:\n      set:\n        x-a: '{clinet}'\n",
                "proxy.yaml:5:14: {clinet} is no value: give one of {request_id}",
            ),
            (
                "routes:\n  - job: kv\n    request:\n      remove: [host]\n",
                "proxy.yaml:4:16: remove: host is set by the proxy itself",
            ),
            ("job: kv\nroutes:\n  - {job: kv}\n", "both routes and job are given"),
            ("gateways: ['us=gw:80']\n", "gateway us=gw:80 is of another region than what?"),
            (
                "access_log:\n  to: stdout\n  format: '{client} {staus}'\n",
                "proxy.yaml:3:11: the access log has no field \"staus\"",
            ),
            (
                "access_log:\n  to: stdout\n  format: '{status}'\n  fields: [status]\n",
                "proxy.yaml:3:11: fields are for format: json",
            ),
            ("access_log: {to: stdout, share: 101%}\n", "the access log's share is 101%"),
            ("timeouts: {connect: 25h}\n", "the configuration cannot work"),
            (
                "forwarded: {headers: [x-forwarded-for, forwarded]}\n",
                "the configuration cannot work",
            ),
            (
                "lookups:\n  shops: {http: {url: 'http://a/{key}'}}\nroutes:\n  - {job: kv, lookup: shps}\n",
                "proxy.yaml:4:23: there is no lookup \"shps\"",
            ),
            ("routes:\n  - {job: kv, lookup: shops}\n", "proxy.yaml:2:23: there is no lookup"),
            (
                "lookups:\n  s: {http: {url: 'http://a/{key}'}}\nroutes:\n  - {job: kv, key: host/path:1, lookup: s}\n",
                "the configuration cannot work\n  why: route /* has a lookup and a grouped key",
            ),
            (
                "lookups:\n  s: {http: {url: 'http://a/{key}'}}\npools: {web: {servers: ['a:80']}}\nroutes:\n  - {pool: web, lookup: s}\n",
                "the configuration cannot work\n  why: route /* has a lookup and a pool",
            ),
            ("lookups:\n  s: {timeout: 0s}\n", "proxy.yaml:2:6: timeout is 0ns: give 1ms to 24h"),
            ("lookups:\n  s: {cache_bytes: 1KiB}\n", "proxy.yaml:2:6: cache_bytes is too little"),
            ("lookups:\n  s: {ttl: 1s}\n", "proxy.yaml:2:6: a lookup has one table"),
            (
                "lookups:\n  s: {http: {url: 'https://a/{key}'}}\n",
                "proxy.yaml:2:6: https://a/{key} is asked by TLS, and nothing says whom to believe",
            ),
            (
                "lookups:\n  s: {http: {url: 'http://a/b'}}\n",
                "proxy.yaml:2:19: s: \"http://a/b\" is no URL of a lookup",
            ),
        ] {
            let failure = fault(yaml).await.unwrap();
            assert!(failure.starts_with(&format!("error: {expected}")), "{failure}");
        }
        let failure = fault("ruotes: []\n").await.unwrap();
        assert!(failure.ends_with("did you mean \"routes\"?"), "{failure}");
        let failure = fault("lookups: {shops: {http: {url: 'http://a/{key}'}}}\nroutes: [{job: kv, lookup: shop}]\n").await.unwrap();
        assert!(failure.ends_with("did you mean \"shops\"?"), "{failure}");
        let failure = fault("timeouts: {pause: 1s}\n").await.unwrap();
        assert!(
            failure.ends_with("how long a pause holds a request is wait, under pauses"),
            "{failure}"
        );
        let failure = fault("timeouts: {hold: 1s}\n").await.unwrap();
        assert!(failure.contains("is hold_wait, beside timeouts"), "{failure}");
        let failure = fault("access_log: {to: stdout, fields: [staus]}\n").await.unwrap();
        assert!(failure.ends_with("did you mean \"status\"?"), "{failure}");
    }

    /// Each object of the schema, and a file that has a field in it which nobody knows.
    #[tokio::test]
    async fn the_fields_are_the_parsers() {
        for (pointer, yaml) in [
            ("/properties", "{nothing_like_it: 1}"),
            ("/properties/access/properties", "{access: {nothing_like_it: 1}}"),
            ("/properties/timeouts/properties", "{timeouts: {nothing_like_it: 1}}"),
            ("/properties/limits/properties", "{limits: {nothing_like_it: 1}}"),
            ("/properties/pauses/properties", "{pauses: {nothing_like_it: 1}}"),
            (
                "/properties/pauses/properties/exempt_header/properties",
                "{pauses: {exempt_header: {nothing_like_it: 1}}}",
            ),
            (
                "/properties/jobs/additionalProperties/properties",
                "{jobs: {kv: {nothing_like_it: 1}}}",
            ),
            (
                "/properties/pools/additionalProperties/properties",
                "{pools: {web: {nothing_like_it: 1}}}",
            ),
            (
                "/properties/pools/additionalProperties/properties/health/properties",
                "{pools: {web: {servers: ['a:80'], health: {nothing_like_it: 1}}}}",
            ),
            (
                "/$defs/task_tls/properties",
                "{pools: {web: {servers: ['a:80'], tls: {nothing_like_it: 1}}}}",
            ),
            ("/$defs/lookup/properties", "{lookups: {s: {nothing_like_it: 1}}}"),
            (
                "/$defs/lookup/properties/sqlite/properties",
                "{lookups: {s: {sqlite: {nothing_like_it: 1}}}}",
            ),
            (
                "/$defs/lookup/properties/postgres/properties",
                "{lookups: {s: {postgres: {nothing_like_it: 1}}}}",
            ),
            (
                "/$defs/lookup/properties/http/properties",
                "{lookups: {s: {http: {nothing_like_it: 1}}}}",
            ),
            ("/$defs/head/properties", "{routes: [{request: {nothing_like_it: 1}}]}"),
            ("/properties/access_log/properties", "{access_log: {to: stdout, nothing_like_it: 1}}"),
            ("/properties/traces/properties", "{traces: {otlp: 'http://a:1', nothing_like_it: 1}}"),
            ("/properties/forwarded/properties", "{forwarded: {nothing_like_it: 1}}"),
            ("/properties/debug/properties", "{debug: {networks: [], nothing_like_it: 1}}"),
            (
                "/$defs/listener/properties",
                "{listeners: [{address: '[::]:0', nothing_like_it: 1}]}",
            ),
            (
                "/$defs/tls/properties",
                "{listeners: [{address: '[::]:0', tls: {certificates: [], nothing_like_it: 1}}]}",
            ),
            ("/$defs/route/properties", "{routes: [{nothing_like_it: 1}]}"),
        ] {
            let failure = fault(yaml).await.unwrap();
            let known = failure.split("known here: ").nth(1).unwrap().lines().next().unwrap();
            let by_parser: BTreeSet<&str> = known.split(", ").collect();
            let schema = schema();
            let fields = schema.pointer(pointer).unwrap().as_object().unwrap();
            assert_eq!(
                fields.keys().map(String::as_str).collect::<BTreeSet<_>>(),
                by_parser,
                "{pointer}"
            );
            let page = include_str!("../../../docs/proxy.md");
            for field in fields.keys() {
                assert!(
                    page.contains(&format!("`{field}`")),
                    "docs/proxy.md does not name {field}"
                );
            }
        }
    }

    #[tokio::test]
    async fn the_documentation_has_good_examples() {
        let page = include_str!("../../../docs/proxy.md");
        let examples: Vec<&str> =
            page.split("```yaml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
        assert!(examples.len() > 1, "{examples:?}");
        for example in examples {
            assert!(taken(example).await, "{example}");
        }
    }
}
