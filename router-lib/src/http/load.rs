//! Counts what requests cost, by their keys' slices, so that the assigner can balance: for servers that take whatever comes. A server
//! that refuses what it does not own has [`crate::http::own::OwnLayer`], which counts as well.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use mandoline::Slicelet;
//! use mandoline::http::key::KeyFrom;
//! use mandoline::http::load::LoadLayer;
//! use tower::{Layer, service_fn};
//!
//! # fn f(slicelet: Arc<Slicelet>) {
//! # let handler = service_fn(|_: http::Request<String>| async { Ok::<_, std::convert::Infallible>(http::Response::new(String::new())) });
//! let service = LoadLayer::new(slicelet, KeyFrom::path(1)).layer(handler);
//! # }
//! ```

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::header::HeaderValue;
use http::{Extensions, Request, Response};
use mandoline_core::key::SliceKey;
use tower::{Layer, Service};

use crate::http::key::KeyFrom;
use crate::http::names::LOAD;
use crate::slicelet::Slicelet;

/// What a request costs, in units of load: a handler puts it into its answer's extensions. 1 without.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost(pub f64);

/// Counts requests by the slices of their keys.
#[derive(Clone)]
pub struct LoadLayer {
    slicelet: Arc<Slicelet>,
    key: KeyFrom,
}

impl LoadLayer {
    /// Counts for this task, by the key that is where `key` says. What has no usable key is not counted.
    pub const fn new(slicelet: Arc<Slicelet>, key: KeyFrom) -> Self {
        Self { slicelet, key }
    }
}

impl<S> Layer<S> for LoadLayer {
    type Service = CountLoad<S>;

    fn layer(&self, inner: S) -> CountLoad<S> {
        CountLoad { layer: self.clone(), inner }
    }
}

/// A service whose requests are counted.
#[derive(Clone)]
pub struct CountLoad<S> {
    layer: LoadLayer,
    inner: S,
}

impl<S, B, R> Service<Request<B>> for CountLoad<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
    R: 'static,
{
    type Response = Response<R>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<R>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let LoadLayer { slicelet, key } = &self.layer;
        let (mut head, body) = request.into_parts();
        let key = key.find(&head).ok();
        let count = key.and_then(|key| Count::begin(slicelet, key, &mut head.extensions));
        let answer = self.inner.call(Request::from_parts(head, body));
        let slicelet = Arc::clone(slicelet);
        Box::pin(async move {
            let mut answer = answer.await?;
            if let Some(count) = count {
                count.answered(&answer);
                tell(&slicelet, &mut answer);
            }
            Ok(answer)
        })
    }
}

/// Says in an answer what the task has served, which tells callers of a job with spill who is loaded.
pub(crate) fn tell<R>(slicelet: &Slicelet, answer: &mut Response<R>) {
    if let Some(load) = slicelet.tells_load() {
        let load = HeaderValue::try_from(load.to_string()).expect("numbers fit a header");
        answer.headers_mut().insert(LOAD, load);
    }
}

/// Someone counts this request already.
#[derive(Clone, Copy, Debug)]
struct Counted;

/// Counts a request when it goes, also if its client has left meanwhile.
pub(crate) struct Count {
    slicelet: Arc<Slicelet>,
    key: SliceKey,
    cost: f64,
}

impl Count {
    /// Begins to count a request, unless someone does.
    pub(crate) fn begin(
        slicelet: &Arc<Slicelet>,
        key: SliceKey,
        of: &mut Extensions,
    ) -> Option<Self> {
        let first = of.insert(Counted).is_none();
        first.then(|| Self { slicelet: Arc::clone(slicelet), key, cost: 1.0 })
    }

    /// Takes what the handler says that it cost.
    pub(crate) fn answered<R>(mut self, answer: &Response<R>) {
        if let Some(Cost(cost)) = answer.extensions().get() {
            self.cost = *cost;
        }
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        // A cost that is none counts as one: the handler's mistake must not hide a request from the balancer.
        if self.slicelet.count_at(self.key, self.cost).is_err() {
            let _counted = self.slicelet.count_at(self.key, 1.0);
        }
    }
}
