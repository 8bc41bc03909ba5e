//! The few things that a proxy has to know of a certificate and that rustls does not tell: how long it is valid, for which names, and
//! whom it is about. It is no verification, which is rustls's: what cannot be read here is none of ours.

use std::fmt::Write as _;
use std::net::IpAddr;

/// What is known of a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Certificate {
    /// In seconds since 1970.
    pub(crate) not_before: i64,
    pub(crate) not_after: i64,
    /// Such as `CN=shop, O=Example`.
    pub(crate) subject: String,
    pub(crate) names: Vec<Name>,
}

/// A name that a certificate is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Name {
    Dns(String),
    Uri(String),
    Mail(String),
    Ip(IpAddr),
}

/// Reads a certificate (RFC 5280); nothing if it is none.
pub(crate) fn read(der: &[u8]) -> Option<Certificate> {
    let mut certificate = Fields(Fields(der).sequence()?);
    let mut fields = Fields(certificate.sequence()?);
    fields.optional(VERSION);
    fields.next()?; // serial number
    fields.sequence()?; // signature algorithm
    fields.sequence()?; // issuer
    let mut validity = Fields(fields.sequence()?);
    let (not_before, not_after) = (time(validity.next()?)?, time(validity.next()?)?);
    let subject = subject(fields.sequence()?)?;
    fields.sequence()?; // public key
    fields.optional(ISSUER_ID);
    fields.optional(SUBJECT_ID);
    let mut names = Vec::new();
    if let Some(extensions) = fields.optional(EXTENSIONS) {
        let mut extensions = Fields(Fields(extensions).sequence()?);
        while !extensions.0.is_empty() {
            let mut extension = Fields(extensions.sequence()?);
            let (_, id) = extension.next()?;
            extension.optional(BOOLEAN);
            let (_, value) = extension.next()?;
            if id == SUBJECT_ALT_NAME {
                names = alternative_names(Fields(value).sequence()?)?;
            }
        }
    }
    Some(Certificate { not_before, not_after, subject, names })
}

const VERSION: u8 = 0xa0;
const ISSUER_ID: u8 = 0x81;
const SUBJECT_ID: u8 = 0x82;
const EXTENSIONS: u8 = 0xa3;
const BOOLEAN: u8 = 0x01;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
/// 2.5.29.17
const SUBJECT_ALT_NAME: &[u8] = &[0x55, 0x1d, 0x11];

/// Fields, one after the other: a tag, a length and so many bytes each.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn next(&mut self) -> Option<(u8, &'a [u8])> {
        let [tag, length, rest @ ..] = self.0 else { return None };
        let (length, rest) = match length {
            0..=0x7f => (usize::from(*length), rest),
            // No certificate is longer than 4 bytes can say.
            0x81..=0x84 => {
                let (digits, rest) = rest.split_at_checked(usize::from(length - 0x80))?;
                (digits.iter().fold(0, |sum, digit| sum << 8 | usize::from(*digit)), rest)
            }
            _ => return None,
        };
        let (value, rest) = rest.split_at_checked(length)?;
        self.0 = rest;
        Some((*tag, value))
    }

    fn sequence(&mut self) -> Option<&'a [u8]> {
        self.next().and_then(|(tag, value)| (tag == SEQUENCE).then_some(value))
    }

    fn optional(&mut self, wanted: u8) -> Option<&'a [u8]> {
        if self.0.first() != Some(&wanted) {
            return None;
        }
        self.next().map(|(_, value)| value)
    }
}

/// `YYMMDDHHMMSSZ` or `YYYYMMDDHHMMSSZ`, in seconds since 1970.
fn time((tag, text): (u8, &[u8])) -> Option<i64> {
    let number = |digits: &[u8]| -> Option<i64> {
        let plain = digits.iter().all(u8::is_ascii_digit);
        std::str::from_utf8(digits).ok().filter(|_| plain)?.parse().ok()
    };
    let (year, rest) = match tag {
        UTC_TIME => {
            let (year, rest) = text.split_at_checked(2)?;
            let year = number(year)?;
            (if year < 50 { 2000 + year } else { 1900 + year }, rest)
        }
        GENERALIZED_TIME => {
            let (year, rest) = text.split_at_checked(4)?;
            (number(year)?, rest)
        }
        _ => return None,
    };
    let [rest @ .., b'Z'] = rest else { return None };
    if rest.len() != 10 {
        return None;
    }
    let parts: Vec<i64> = rest.chunks(2).map(number).collect::<Option<_>>()?;
    let [month @ 1..=12, day @ 1..=31, hour, minute, second] = parts[..] else { return None };
    // Days since 1970, of a year that begins in March, so that the leap day is its last.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day;
    Some((days - 719_469) * 86_400 + hour * 3600 + minute * 60 + second)
}

fn subject(rest: &[u8]) -> Option<String> {
    let (mut text, mut sets) = (String::new(), Fields(rest));
    while !sets.0.is_empty() {
        let (SET, set) = sets.next()? else { return None };
        let mut set = Fields(set);
        while !set.0.is_empty() {
            let mut pair = Fields(set.sequence()?);
            let ((_, id), (_, value)) = (pair.next()?, pair.next()?);
            let Some((_, name)) = ATTRIBUTES.iter().find(|(known, _)| *known == id) else {
                continue;
            };
            if !text.is_empty() {
                text.push_str(", ");
            }
            // Writing to a string cannot fail.
            let _: std::fmt::Result = write!(text, "{name}={}", plain(value));
        }
    }
    Some(text)
}

/// The attributes of a subject that are told, and what they are called.
const ATTRIBUTES: [(&[u8], &str); 7] = [
    (&[0x55, 4, 3], "CN"),
    (&[0x55, 4, 10], "O"),
    (&[0x55, 4, 11], "OU"),
    (&[0x55, 4, 6], "C"),
    (&[0x55, 4, 7], "L"),
    (&[0x55, 4, 8], "ST"),
    (&[0x55, 4, 5], "serialNumber"),
];

/// Text that can stand in a header and in a list: what has a meaning there is quoted as by RFC 4514, and what is no text is `?`.
fn plain(value: &[u8]) -> String {
    let mut text = String::new();
    for &byte in value {
        match byte {
            b',' | b'+' | b'"' | b'\\' | b'<' | b'>' | b';' | b'=' => {
                text.push('\\');
                text.push(byte.into());
            }
            b' '..=b'~' => text.push(byte.into()),
            _ => text.push('?'),
        }
    }
    text
}

fn alternative_names(rest: &[u8]) -> Option<Vec<Name>> {
    let (mut names, mut rest) = (Vec::new(), Fields(rest));
    while !rest.0.is_empty() {
        let (tag, value) = rest.next()?;
        let text = || {
            let graphic = value.iter().all(u8::is_ascii_graphic);
            graphic.then(|| String::from_utf8_lossy(value).into_owned())
        };
        let name = match tag {
            0x81 => text().map(Name::Mail),
            0x82 => text().map(|name| Name::Dns(name.to_ascii_lowercase())),
            0x86 => text().map(Name::Uri),
            0x87 => match value.len() {
                4 => <[u8; 4]>::try_from(value).ok().map(|octets| Name::Ip(octets.into())),
                16 => <[u8; 16]>::try_from(value).ok().map(|octets| Name::Ip(octets.into())),
                _ => None,
            },
            _ => None,
        };
        names.extend(name);
    }
    Some(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_seconds_since_1970() {
        for (tag, text, wanted) in [
            (UTC_TIME, "700101000000Z", Some(0)),
            (UTC_TIME, "000301000000Z", Some(951_868_800)),
            (UTC_TIME, "491231235959Z", Some(2_524_607_999)),
            (GENERALIZED_TIME, "20240229120000Z", Some(1_709_208_000)),
            (GENERALIZED_TIME, "99991231235959Z", Some(253_402_300_799)),
            (UTC_TIME, "701301000000Z", None),
            (UTC_TIME, "700101000000", None),
            (UTC_TIME, "70010100000Z", None),
            (UTC_TIME, "+10101000000Z", None),
        ] {
            assert_eq!(time((tag, text.as_bytes())), wanted, "{text}");
        }
    }

    #[test]
    fn what_is_no_certificate_is_none() {
        for bad in [&[][..], &[0x30], &[0x30, 0x84, 0xff, 0xff, 0xff, 0xff], &[0x30, 2, 0x30, 0]] {
            assert_eq!(read(bad), None);
        }
        assert_eq!(plain(b"a,b=c\r\n\xff"), "a\\,b\\=c???");
    }
}
