//! Whether a value fits a JSON Schema, for the tests that hold schemas against parsers.

use regex::Regex;
use serde_json::Value;

/// Says whether a value fits a schema, by the keywords that ours has. One that is not known here fails the test: what is not
/// understood is not tested.
pub(crate) fn fits(root: &Value, schema: &Value, value: &Value) -> bool {
    let rules = schema.as_object().expect("a schema is an object");
    rules.iter().all(|(rule, given)| match rule.as_str() {
        "$schema" | "title" | "description" | "default" | "examples" | "$defs" => true,
        "$ref" => {
            let path = given.as_str().unwrap().strip_prefix('#').unwrap();
            fits(root, root.pointer(path).unwrap(), value)
        }
        "type" => match given.as_str().unwrap() {
            "object" => value.is_object(),
            "array" => value.is_array(),
            "string" => value.is_string(),
            "boolean" => value.is_boolean(),
            "number" => value.is_number(),
            "integer" => value.is_u64() || value.is_i64(),
            other => panic!("type {other}"),
        },
        "required" => list(given).iter().all(|name| value.get(name.as_str().unwrap()).is_some()),
        "properties" => given
            .as_object()
            .unwrap()
            .iter()
            .all(|(name, rules)| value.get(name).is_none_or(|value| fits(root, rules, value))),
        "additionalProperties" => {
            let known = schema.get("properties").and_then(Value::as_object);
            let extra = |name: &String| known.is_none_or(|known| !known.contains_key(name));
            let object = value.as_object();
            object.is_none_or(|object| {
                object.iter().filter(|(name, _)| extra(name)).all(|(_, value)| match given {
                    Value::Bool(allowed) => *allowed,
                    rules => fits(root, rules, value),
                })
            })
        }
        "propertyNames" => value.as_object().is_none_or(|object| {
            object.keys().all(|name| fits(root, given, &Value::String(name.clone())))
        }),
        "maxProperties" => {
            value.as_object().is_none_or(|map| map.len() as u64 <= given.as_u64().unwrap())
        }
        "items" => value.as_array().is_none_or(|all| all.iter().all(|one| fits(root, given, one))),
        "minItems" => {
            value.as_array().is_none_or(|all| all.len() as u64 >= given.as_u64().unwrap())
        }
        "uniqueItems" => value.as_array().is_none_or(|all| {
            all.iter().enumerate().all(|(place, one)| !all[..place].contains(one))
        }),
        "maxItems" => {
            value.as_array().is_none_or(|all| all.len() as u64 <= given.as_u64().unwrap())
        }
        "oneOf" => list(given).iter().filter(|rules| fits(root, rules, value)).count() == 1,
        "not" => !fits(root, given, value),
        "enum" => list(given).contains(value),
        "const" => given == value,
        "pattern" => {
            let pattern = Regex::new(given.as_str().unwrap()).unwrap();
            value.as_str().is_none_or(|text| pattern.is_match(text))
        }
        "minLength" => {
            value.as_str().is_none_or(|text| text.chars().count() as u64 >= given.as_u64().unwrap())
        }
        "maxLength" => {
            value.as_str().is_none_or(|text| text.chars().count() as u64 <= given.as_u64().unwrap())
        }
        "minimum" => value.as_f64().is_none_or(|number| number >= given.as_f64().unwrap()),
        "maximum" => value.as_f64().is_none_or(|number| number <= given.as_f64().unwrap()),
        "exclusiveMinimum" => value.as_f64().is_none_or(|number| number > given.as_f64().unwrap()),
        other => panic!("the test does not know the rule {other:?}"),
    })
}

fn list(value: &Value) -> &Vec<Value> {
    value.as_array().expect("a list")
}
