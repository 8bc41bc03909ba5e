//! One field of a JSON text, for keys in bodies and in tokens: read once through, and refused where it is there twice, which readers
//! take either of.

use std::fmt;

use mandoline_core::extract::Miss;
use mandoline_core::recipe;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, Visitor};

/// Reads JSON.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Json;

impl recipe::Json for Json {
    fn field(&self, json: &[u8], path: &[Box<str>]) -> Result<Vec<u8>, Miss> {
        let mut reader = serde_json::Deserializer::from_slice(json);
        let found = Field(path).deserialize(&mut reader).map_err(|error| {
            let twice = error.is_data() && error.to_string().starts_with(TWICE);
            if twice { Miss::Twice } else { Miss::Unreadable }
        })?;
        reader.end().map_err(|_| Miss::Unreadable)?;
        found.ok_or(Miss::NoKey)
    }
}

const TWICE: &str = "field twice";

/// The field at the end of a path.
struct Field<'a>(&'a [Box<str>]);

impl<'de> DeserializeSeed<'de> for Field<'_> {
    type Value = Option<Vec<u8>>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Field<'_> {
    type Value = Option<Vec<u8>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "a string, a number or a boolean" } else { "an object" })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let Some((name, rest)) = self.0.split_first() else {
            return Err(A::Error::invalid_type(serde::de::Unexpected::Map, &self));
        };
        let (mut found, mut seen) = (None, false);
        while let Some(key) = map.next_key::<std::borrow::Cow<'de, str>>()? {
            if *key != **name {
                let _: IgnoredAny = map.next_value()?;
            } else if seen {
                return Err(A::Error::custom(TWICE));
            } else {
                seen = true;
                found = map.next_value_seed(Field(rest))?;
            }
        }
        Ok(found)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        self.scalar(text)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Self::Value, E> {
        self.scalar(if value { "true" } else { "false" })
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Self::Value, E> {
        self.scalar(&number.to_string())
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<Self::Value, E> {
        self.scalar(&number.to_string())
    }

    /// Nothing is there, as if the field were not.
    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
}

impl Field<'_> {
    /// Takes a value at the end of the path. One in the middle of it has no fields.
    fn scalar<E: Error>(self, text: &str) -> Result<Option<Vec<u8>>, E> {
        Ok(self.0.is_empty().then(|| text.as_bytes().to_vec()))
    }
}

#[cfg(test)]
mod tests {
    use mandoline_core::recipe::Json as _;

    use super::*;

    #[test]
    fn a_field_is_found_or_refused() {
        let find = |json: &str, path: &str| {
            let path: Vec<Box<str>> = path.split('/').map(Into::into).collect();
            Json.field(json.as_bytes(), &path).map(|found| String::from_utf8(found).unwrap())
        };
        for (json, path, wanted) in [
            (r#"{"a": "x"}"#, "a", Ok("x")),
            (r#"{"a": 7, "b": {"c": true}}"#, "a", Ok("7")),
            (r#"{"a": -7}"#, "a", Ok("-7")),
            (r#"{"a": 7, "b": {"c": true}}"#, "b/c", Ok("true")),
            (r#"{"\u0061": "\u00e9\n"}"#, "a", Ok("\u{e9}\n")),
            (r#"{"b": {"a": 1}}"#, "a", Err(Miss::NoKey)),
            (r#"{"a": null}"#, "a", Err(Miss::NoKey)),
            (r#"{"a": "x"}"#, "a/b", Err(Miss::NoKey)),
            (r#"{"a": "x", "a": "y"}"#, "a", Err(Miss::Twice)),
            (r#"{"a": {"b": 1}, "\u0061": {"b": 1}}"#, "a/b", Err(Miss::Twice)),
            (r#"{"a": {"b": 1}}"#, "a", Err(Miss::Unreadable)),
            (r#"{"a": ["x"]}"#, "a", Err(Miss::Unreadable)),
            // Two texts of one number would be two keys.
            (r#"{"a": 1.0}"#, "a", Err(Miss::Unreadable)),
            (r#"{"a": 1} x"#, "a", Err(Miss::Unreadable)),
            (r#"{"a": 1"#, "a", Err(Miss::Unreadable)),
            ("", "a", Err(Miss::Unreadable)),
            ("[]", "a", Err(Miss::Unreadable)),
            (&"[".repeat(1000), "a", Err(Miss::Unreadable)),
            (&format!("{{\"b\": {}, \"a\": 1}}", "[".repeat(500)), "a", Err(Miss::Unreadable)),
        ] {
            assert_eq!(find(json, path), wanted.map(str::to_owned), "{path} of {json}");
        }
    }
}
