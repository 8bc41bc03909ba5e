//! The deadline of a gRPC call, as its request says it (`grpc-timeout`, in the specification of gRPC over HTTP/2).

use std::time::Duration;

use http::header::HeaderMap;

const GRPC_TIMEOUT: &str = "grpc-timeout";

/// Gives how long a call may take, if it says so in a way that can be read.
pub(crate) fn of(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(GRPC_TIMEOUT)?.to_str().ok()?;
    let unit = text.chars().next_back()?;
    let number = &text[..text.len() - unit.len_utf8()];
    // At most eight digits, so no product of these overflows.
    let plain = (1..=8).contains(&number.len()) && number.bytes().all(|b| b.is_ascii_digit());
    let number: u64 = plain.then(|| number.parse().ok()).flatten()?;
    Some(match unit {
        'H' => Duration::from_secs(number * 3_600),
        'M' => Duration::from_secs(number * 60),
        'S' => Duration::from_secs(number),
        'm' => Duration::from_millis(number),
        'u' => Duration::from_micros(number),
        'n' => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_are_read_in_all_units_and_nonsense_is_none() {
        let of = |text: &str| {
            of(&HeaderMap::from_iter([(GRPC_TIMEOUT.parse().unwrap(), text.parse().unwrap())]))
        };
        for (text, millis) in
            [("1H", 3_600_000), ("2M", 120_000), ("3S", 3_000), ("4m", 4), ("5000u", 5)]
        {
            assert_eq!(of(text), Some(Duration::from_millis(millis)), "{text}");
        }
        assert_eq!(of("99999999n"), Some(Duration::from_nanos(99_999_999)));
        for bad in ["", "S", "1", "1s", "-1S", "999999999S", "1.5S"] {
            assert_eq!(of(bad), None, "{bad}");
        }
        assert_eq!(super::of(&HeaderMap::new()), None);
    }
}
