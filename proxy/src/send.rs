//! Small messages leave in one piece: the kernel takes one buffer with less ado than a list of them, so much less that it pays to copy.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::AsyncWrite;

/// A message up to this size is copied into one piece: the heads of most requests, and most answers of a few hundred bytes. Of a longer
/// one the list costs little beside the bytes themselves.
const SMALL_BYTES: usize = 2 << 10;

/// Writes pieces, as one where they are few bytes.
pub(crate) fn poll_write_pieces(
    stream: Pin<&mut impl AsyncWrite>,
    context: &mut Context<'_>,
    pieces: &[io::IoSlice<'_>],
) -> Poll<io::Result<usize>> {
    if let [piece] = pieces {
        return stream.poll_write(context, piece);
    }
    let length: usize = pieces.iter().map(|piece| piece.len()).sum();
    if length > SMALL_BYTES {
        return stream.poll_write_vectored(context, pieces);
    }
    let (mut whole, mut at) = ([0; SMALL_BYTES], 0);
    for piece in pieces {
        whole[at..][..piece.len()].copy_from_slice(piece);
        at += piece.len();
    }
    stream.poll_write(context, &whole[..at])
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::AsyncReadExt;
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    #[tokio::test]
    async fn pieces_arrive_in_order_whether_few_or_many_bytes() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut far, _) = listener.accept().await.unwrap();
        for lengths in
            [&[0][..], &[7], &[1, 0, 2], &[SMALL_BYTES - 1, 1], &[SMALL_BYTES, 1], &[9, 9_000]]
        {
            let texts: Vec<Vec<u8>> =
                lengths.iter().zip(b'a'..).map(|(length, letter)| vec![letter; *length]).collect();
            let pieces: Vec<_> = texts.iter().map(|text| io::IoSlice::new(text)).collect();
            let written =
                poll_fn(|context| poll_write_pieces(Pin::new(&mut near), context, &pieces));
            // A new socket has room for all of it.
            assert_eq!(written.await.unwrap(), lengths.iter().sum::<usize>());
            let mut read = vec![0; lengths.iter().sum()];
            far.read_exact(&mut read).await.unwrap();
            assert_eq!(read, texts.concat(), "{lengths:?}");
        }
    }
}
