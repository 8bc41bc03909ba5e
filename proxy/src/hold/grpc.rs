//! How long a gRPC client waits, as it says itself: <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>.

use std::time::Duration;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};

/// Says how long the client waits, if it speaks gRPC and says so.
pub(crate) fn patience(headers: &HeaderMap) -> Option<Duration> {
    let kind = headers.get(header::CONTENT_TYPE)?.as_bytes();
    let plain = kind.strip_prefix(b"application/grpc")?;
    // Not grpc-web, whose errors are spelt otherwise.
    if !matches!(plain.first(), None | Some(b'+' | b';')) {
        return None;
    }
    read(headers.get(TIMEOUT)?)
}

/// Says to the task how long the client still waits.
pub(crate) fn shorten(headers: &mut HeaderMap, left: Duration) {
    // Rounded down, so that the task does not take it for longer than the client does. It lasts eight digits.
    let text = match left.as_micros() {
        micros @ 0..=99_999_999 => format!("{micros}u"),
        _ => format!("{}m", left.as_millis().min(99_999_999)),
    };
    headers.insert(TIMEOUT, HeaderValue::try_from(text).expect("digits and a letter fit a header"));
}

/// One to eight digits and a unit.
fn read(value: &HeaderValue) -> Option<Duration> {
    let text = value.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if !(1..=8).contains(&digits.len()) || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3_600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

const TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(kind: &'static str, timeout: &'static str) -> Option<Duration> {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        headers.insert(TIMEOUT, HeaderValue::from_static(timeout));
        patience(&headers)
    }

    #[test]
    fn a_client_of_grpc_says_how_long_it_waits() {
        let one = Some(Duration::from_secs(1));
        for (text, length) in [
            ("1S", one),
            ("1000m", one),
            ("1000000u", one),
            ("99999999n", Some(Duration::from_nanos(99_999_999))),
            ("2M", Some(Duration::from_secs(120))),
            ("1H", Some(Duration::from_secs(3_600))),
            ("99999999H", Some(Duration::from_secs(99_999_999 * 3_600))),
        ] {
            assert_eq!(asked("application/grpc", text), length, "{text}");
        }
        for bad in ["", "S", "1", "-1S", "1.5S", "123456789S", "1s", "1 S", "1SS"] {
            assert_eq!(asked("application/grpc", bad), None, "{bad}");
        }
        assert_eq!(asked("application/grpc+proto", "1S"), one);
        assert_eq!(asked("application/grpc; x=1", "1S"), one);
        assert_eq!(asked("application/grpc-web", "1S"), None);
        assert_eq!(asked("text/plain", "1S"), None);
    }

    #[test]
    fn what_is_left_is_said_in_eight_digits_and_reads_back() {
        for (left, text) in [
            (Duration::ZERO, "0u"),
            (Duration::from_millis(1_500), "1500000u"),
            (Duration::from_secs(500), "500000m"),
            (Duration::MAX, "99999999m"),
        ] {
            let mut headers = HeaderMap::new();
            shorten(&mut headers, left);
            assert_eq!(headers[TIMEOUT], text);
            assert!(read(&headers[TIMEOUT]).is_some());
        }
    }
}
