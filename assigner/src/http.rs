//! What a node answers to plain HTTP on its client port: is the process alive, can it be used, what does it count.

use std::sync::Arc;

use axum::Router;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;

/// What the pages are made of.
pub(crate) trait Pages: Send + Sync + 'static {
    /// Each thing that must hold before the node can be used, whether it does, and what it is.
    fn checks(&self) -> Vec<Check>;
    /// Everything counted, in the OpenMetrics text format.
    fn metrics(&self) -> String;
}

/// One thing that must hold before the node can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Check {
    pub(crate) name: &'static str,
    pub(crate) good: bool,
    pub(crate) detail: String,
}

/// Gives the pages' routes.
pub(crate) fn routes<P: Pages>(pages: Arc<P>) -> Router {
    Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(ready::<P>))
        .route("/metrics", get(metrics::<P>))
        .with_state(pages)
}

async fn ready<P: Pages>(State(pages): State<Arc<P>>, RawQuery(query): RawQuery) -> Response {
    let checks = pages.checks();
    let good = checks.iter().all(|check| check.good);
    let status = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let verbose =
        query.is_some_and(|query| query.split('&').any(|part| part.starts_with("verbose")));
    let line = |check: &Check| {
        let mark = if check.good { "ok" } else { "failed" };
        format!("[{mark}] {}: {}\n", check.name, check.detail)
    };
    // What failed is always said: who looks at a page that says no wants to know why.
    let shown = checks.iter().filter(|check| verbose || !check.good);
    let mut text: String = shown.map(line).collect();
    text.push_str(if good { "ok\n" } else { "not ready\n" });
    (status, text).into_response()
}

async fn metrics<P: Pages>(State(pages): State<Arc<P>>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(CONTENT_TYPE, kind)], pages.metrics()).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Sample(bool);

    impl Pages for Sample {
        fn checks(&self) -> Vec<Check> {
            let check = |name, good| Check { name, good, detail: "n1".to_owned() };
            vec![check("log", true), check("leader", self.0)]
        }

        fn metrics(&self) -> String {
            "# EOF\n".to_owned()
        }
    }

    async fn page(good: bool, query: Option<&str>) -> (StatusCode, String) {
        let query = RawQuery(query.map(str::to_owned));
        let response = ready(State(Arc::new(Sample(good))), query).await;
        let status = response.status();
        let bytes = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
        (status, String::from_utf8(bytes.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn a_node_is_ready_when_all_checks_hold() {
        assert_eq!(page(true, None).await, (StatusCode::OK, "ok\n".to_owned()));
        let (status, text) = page(false, None).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(text, "[failed] leader: n1\nnot ready\n");
        let (_, verbose) = page(true, Some("verbose")).await;
        assert_eq!(verbose, "[ok] log: n1\n[ok] leader: n1\nok\n");
    }
}
