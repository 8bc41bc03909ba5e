//! Takes in what this task owns, and answers the rest by whoever does: 421 in HTTP, `FAILED_PRECONDITION` in gRPC.
//!
//! The key's guard is held until the answer's last byte is read, so a hand-off waits for the request; the handler finds it in the request's
//! extensions as [`Own`], to ask whether the key is still owned or to hand its fencing token on to storage.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use mandoline::Slicelet;
//! use mandoline::http::key::KeyFrom;
//! use mandoline::http::own::{Own, OwnLayer};
//! use tower::{Layer, service_fn};
//!
//! # fn f(slicelet: Arc<Slicelet>) {
//! let handler = service_fn(|request: http::Request<String>| async move {
//!     let Own(guard) = request.extensions().get().expect("the layer takes in nothing else");
//!     Ok::<_, std::convert::Infallible>(http::Response::new(guard.fencing_token().to_string()))
//! });
//! let service = OwnLayer::new(slicelet, KeyFrom::path(1)).layer(handler);
//! # }
//! ```

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::request::Parts;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use mandoline_core::key::SliceKey;
use tower::{Layer, Service};

use crate::guard::Guard;
use crate::http::key::KeyFrom;
use crate::http::load::{Count, tell};
use crate::http::names::SPILL;
use crate::http::refused::{Refused, is_grpc, unsay};
use crate::slicelet::Slicelet;

/// The word that this task owns a request's key: in the extensions of each request that is taken in, but of one that its caller
/// has spilled here.
#[derive(Clone, Debug)]
pub struct Own(pub Arc<Guard>);

/// Takes in what this task owns.
#[derive(Clone)]
pub struct OwnLayer {
    slicelet: Arc<Slicelet>,
    key: KeyFrom,
}

impl OwnLayer {
    /// Takes in what `slicelet` owns, by the key that is where `key` says; counts what is taken in as load.
    pub const fn new(slicelet: Arc<Slicelet>, key: KeyFrom) -> Self {
        Self { slicelet, key }
    }
}

impl<S> Layer<S> for OwnLayer {
    type Service = TakeIn<S>;

    fn layer(&self, inner: S) -> TakeIn<S> {
        TakeIn { layer: self.clone(), inner }
    }
}

/// A service that sees only requests for keys that its task owns.
#[derive(Clone)]
pub struct TakeIn<S> {
    layer: OwnLayer,
    inner: S,
}

/// What holds while a request is served.
pub(crate) struct Taken {
    own: Option<Own>,
    count: Option<Count>,
}

/// Takes a request in, if its key is this task's, and notes so in its extensions.
pub(crate) fn take(
    slicelet: &Arc<Slicelet>,
    key: SliceKey,
    head: &mut Parts,
) -> Result<Taken, Refused> {
    // What it costs is counted when it is over.
    let is_spilled = head.headers.contains_key(SPILL) && slicelet.takes_spilled();
    let own = match is_spilled {
        true => None,
        false => Some(Own(Arc::new(slicelet.acquire_at(key, 0.0)?))),
    };
    if let Some(own) = &own {
        head.extensions.insert(own.clone());
    }
    let count = Count::begin(slicelet, key, &mut head.extensions);
    Ok(Taken { own, count })
}

impl Taken {
    /// Makes the answer that goes out: with what the task has served, and with the guard until its last byte.
    pub(crate) fn answer<R>(
        self,
        slicelet: &Slicelet,
        mut answer: Response<R>,
    ) -> Response<Answer<R>> {
        if let Some(count) = self.count {
            count.answered(&answer);
            tell(slicelet, &mut answer);
        }
        unsay(&mut answer);
        answer.map(|body| Answer(Inner::Served { body, _own: self.own }))
    }
}

/// The body of an answer: the handler's, or the sentence of a refusal.
pub struct Answer<R>(Inner<R>);

enum Inner<R> {
    Served { body: R, _own: Option<Own> },
    Refused(Bytes),
}

impl<R> Answer<R> {
    /// Makes the answer to a request that was not taken in.
    pub(crate) fn refused(why: &Refused, is_grpc: bool) -> Response<Self> {
        why.answer(is_grpc).map(Self::said)
    }

    /// Makes the body of an answer that no handler made.
    pub(crate) const fn said(text: Bytes) -> Self {
        Self(Inner::Refused(text))
    }
}

impl<R: Body<Data = Bytes> + Unpin> Body for Answer<R> {
    type Data = Bytes;
    type Error = R::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, R::Error>>> {
        match &mut self.0 {
            Inner::Served { body, .. } => Pin::new(body).poll_frame(cx),
            Inner::Refused(text) if text.is_empty() => Poll::Ready(None),
            Inner::Refused(text) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(text))))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Inner::Served { body, .. } => body.is_end_stream(),
            Inner::Refused(text) => text.is_empty(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Inner::Served { body, .. } => body.size_hint(),
            Inner::Refused(text) => SizeHint::with_exact(text.len() as u64),
        }
    }
}

impl<S, B, R> Service<Request<B>> for TakeIn<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    R: Send + 'static,
{
    type Response = Response<Answer<R>>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let OwnLayer { slicelet, key } = &self.layer;
        let (mut head, body) = request.into_parts();
        let is_grpc = is_grpc(&head.headers);
        let key = key.find(&head).map_err(Refused::NoKey);
        let taken = match key.and_then(|key| take(slicelet, key, &mut head)) {
            Ok(taken) => taken,
            Err(why) => return Box::pin(std::future::ready(Ok(Answer::refused(&why, is_grpc)))),
        };
        let answer = self.inner.call(Request::from_parts(head, body));
        let slicelet = Arc::clone(slicelet);
        Box::pin(async move { Ok(taken.answer(&slicelet, answer.await?)) })
    }
}
