//! A client's connection as bytes: a TCP or a Unix socket, in the clear or within TLS, and what was read of it already.

use std::io;
use std::iter;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio_rustls::server::TlsStream;

/// A socket that listens.
pub(crate) enum Listening {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listening {
    /// Takes a socket over whose address says what it is.
    pub(crate) fn new(socket: socket2::Socket) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        if socket.local_addr()?.is_unix() {
            UnixListener::from_std(socket.into()).map(Self::Unix)
        } else {
            TcpListener::from_std(socket.into()).map(Self::Tcp)
        }
    }

    /// Takes the next client, and says where it is if that can be said.
    pub(crate) fn poll_accept(
        &self,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<(Socket, Option<SocketAddr>)>> {
        match self {
            Self::Tcp(listener) => listener
                .poll_accept(context)
                .map_ok(|(stream, peer)| (Socket::Tcp(stream), Some(peer))),
            Self::Unix(listener) => {
                listener.poll_accept(context).map_ok(|(stream, _)| (Socket::Unix(stream), None))
            }
        }
    }
}

impl Listening {
    /// Takes those who wait already, and closes.
    pub(crate) fn last_comers(self) -> Vec<(Socket, Option<SocketAddr>)> {
        let mut waiting = Vec::new();
        match self {
            Self::Tcp(listener) => {
                let Ok(listener) = listener.into_std() else { return waiting };
                for (stream, peer) in iter::from_fn(|| next(|| listener.accept())) {
                    let stream = stream.set_nonblocking(true).and_then(|()| stream.try_into());
                    waiting.extend(stream.map(|stream| (Socket::Tcp(stream), Some(peer))));
                }
            }
            Self::Unix(listener) => {
                let Ok(listener) = listener.into_std() else { return waiting };
                for (stream, _) in iter::from_fn(|| next(|| listener.accept())) {
                    let stream = stream.set_nonblocking(true).and_then(|()| stream.try_into());
                    waiting.extend(stream.map(|stream| (Socket::Unix(stream), None)));
                }
            }
        }
        waiting
    }
}

/// Accepts the next one who waits, past those who have left.
fn next<T>(accept: impl Fn() -> io::Result<T>) -> Option<T> {
    loop {
        match accept() {
            Ok(accepted) => return Some(accepted),
            Err(error) if has_left(&error) => {}
            Err(_) => return None,
        }
    }
}

fn has_left(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted)
}

/// A client's socket.
pub(crate) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    /// Writes what there is room for at once.
    pub(crate) fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.try_write(bytes),
            Self::Unix(stream) => stream.try_write(bytes),
        }
    }
}

/// A socket, and what was read of it already.
pub(crate) struct Plain {
    socket: Socket,
    ahead: Bytes,
}

impl Plain {
    pub(crate) const fn new(socket: Socket) -> Self {
        Self { socket, ahead: Bytes::new() }
    }

    /// Has the next read begin with these bytes, before what was put back and not read again.
    pub(crate) fn unread(&mut self, bytes: Bytes) {
        self.ahead = match self.ahead.is_empty() {
            true => bytes,
            false => [bytes, std::mem::take(&mut self.ahead)].concat().into(),
        };
    }
}

impl AsFd for Plain {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Tcp(stream) => stream.as_fd(),
            Socket::Unix(stream) => stream.as_fd(),
        }
    }
}

/// A client's connection.
pub(crate) enum Stream {
    Clear(Plain),
    Tls(Box<TlsStream<Plain>>),
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Clear(plain) => plain.as_fd(),
            Self::Tls(stream) => stream.get_ref().0.as_fd(),
        }
    }
}

impl Stream {
    /// Says whether the kernel gives up a client that takes nothing, as it is told of TCP's sockets when they are accepted.
    pub(crate) fn is_given_up_by_kernel(&self) -> bool {
        let plain = match self {
            Self::Clear(plain) => plain,
            Self::Tls(stream) => stream.get_ref().0,
        };
        cfg!(target_os = "linux") && matches!(plain.socket, Socket::Tcp(_))
    }
}

/// Calls the same of whichever it is.
macro_rules! either {
    ($self:expr, $one:path, $other:path, $inner:ident => $call:expr) => {
        match $self {
            $one($inner) => $call,
            $other($inner) => $call,
        }
    };
}

impl AsyncRead for Plain {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.ahead.is_empty() {
            let next = self.ahead.len().min(buffer.remaining());
            buffer.put_slice(&self.ahead.split_to(next));
            return Poll::Ready(Ok(()));
        }
        either!(&mut self.socket, Socket::Tcp, Socket::Unix, stream => Pin::new(stream).poll_read(context, buffer))
    }
}

impl AsyncWrite for Plain {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        either!(&mut self.socket, Socket::Tcp, Socket::Unix, stream => Pin::new(stream).poll_write(context, bytes))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(&mut self.socket, Socket::Tcp, Socket::Unix, stream => Pin::new(stream).poll_flush(context))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(&mut self.socket, Socket::Tcp, Socket::Unix, stream => Pin::new(stream).poll_shutdown(context))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(&mut self.socket, Socket::Tcp, Socket::Unix, stream => Pin::new(stream).poll_write_vectored(context, buffers))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        either!(&mut *self, Self::Clear, Self::Tls, stream => Pin::new(stream).poll_read(context, buffer))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        either!(&mut *self, Self::Clear, Self::Tls, stream => Pin::new(stream).poll_write(context, bytes))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(&mut *self, Self::Clear, Self::Tls, stream => Pin::new(stream).poll_flush(context))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(&mut *self, Self::Clear, Self::Tls, stream => Pin::new(stream).poll_shutdown(context))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(&mut *self, Self::Clear, Self::Tls, stream => Pin::new(stream).poll_write_vectored(context, buffers))
    }

    fn is_write_vectored(&self) -> bool {
        either!(self, Self::Clear, Self::Tls, stream => stream.is_write_vectored())
    }
}
