//! A value that a flag and a file give alike, by its text form: what `FromStr` reads, a file reads too.

use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

use serde::de::{Deserialize, Deserializer, Visitor};

/// A value that is given by its text form.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Text<T>(pub(crate) T);

impl<T: FromStr> FromStr for Text<T> {
    type Err = T::Err;

    fn from_str(text: &str) -> Result<Self, T::Err> {
        text.parse().map(Self)
    }
}

impl<T: fmt::Display> fmt::Display for Text<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de, T: FromStr<Err: fmt::Display>> Deserialize<'de> for Text<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Form<T>(PhantomData<T>);

        impl<T: FromStr<Err: fmt::Display>> Visitor<'_> for Form<T> {
            type Value = Text<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Text<T>, E> {
                text.parse().map_err(E::custom)
            }
        }

        from.deserialize_str(Form(PhantomData))
    }
}

/// Takes the values out.
pub(crate) fn plain<T>(texts: Vec<Text<T>>) -> Vec<T> {
    texts.into_iter().map(|Text(value)| value).collect()
}

/// Fills what a flag or the environment did not give from a file.
macro_rules! overlay {
    ($flags:expr, $file:expr; $($field:ident),+ $(,)?) => {
        $( $flags.$field = $flags.$field.take().or($file.$field); )+
    };
}
pub(crate) use overlay;

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::file;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        listen: Option<Text<std::net::SocketAddr>>,
        count: Option<u8>,
    }

    #[test]
    fn a_file_reads_what_a_flag_reads() {
        let sample: Sample = file::parse("listen: 127.0.0.1:80\n", "a.yaml").unwrap();
        assert_eq!(sample.listen, Some("127.0.0.1:80".parse().unwrap()));
        let failure = file::parse::<Sample>("listen: here\n", "a.yaml").unwrap_err().to_string();
        assert!(
            failure.starts_with("error: a.yaml:1:9: listen: invalid socket address"),
            "{failure}"
        );
    }

    #[test]
    fn a_flag_wins_over_the_file() {
        let mut flags = Sample { listen: Some("127.0.0.1:1".parse().unwrap()), count: None };
        let file = Sample { listen: Some("127.0.0.1:2".parse().unwrap()), count: Some(7) };
        overlay!(flags, file; listen, count);
        assert_eq!(flags.listen.unwrap().to_string(), "127.0.0.1:1");
        assert_eq!(flags.count, Some(7));
    }
}
